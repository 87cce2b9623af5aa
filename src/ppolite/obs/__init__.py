"""What a person sees of a run: metrics on disk, lines on the terminal, the report, the rating tool."""
