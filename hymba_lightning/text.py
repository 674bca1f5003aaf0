"""Text from anywhere (names of runs, tensors, files) made safe for where it is shown."""


def printable(text: str, most: int | None = None) -> str:
    """The text without characters that would steer a terminal, its middle left out where it has over `most`."""
    if most is not None and len(text) > most:
        text = f"{text[:most // 2]} … {text[-(most // 2):]}"
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
