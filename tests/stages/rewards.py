"""A reward function for recipes of tests."""


def lengths(responses: list[str]) -> list[int]:
    """Words of each."""
    return [len(response.split()) for response in responses]
