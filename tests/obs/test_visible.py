from ppolite.obs.visible import visible


def test_escape_sequences_and_overrides_lose_their_power():
    assert visible("a\x1b[31mred\x07\x7f\r") == "a␛[31mred␇␡␍"
    assert visible("a\x9b\u202eb\u2028\ud800") == "a⟨U+009B⟩⟨U+202E⟩b⟨U+2028⟩⟨U+D800⟩"


def test_ordinary_text_stays():
    text = "影评：很好！\n\t👩‍🔬 naïve «ok»"
    assert visible(text) == text
    assert visible("a\nb", keep="") == "a␊b"
