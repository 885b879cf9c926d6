"""HellaSwag's texts without the marks that their source left in them."""

import re

_BRACKETS = re.compile(r"\[.*?\]")


def clean(text: str) -> str:
    """A text of HellaSwag as every evaluator cleans it.

    Outer space goes; " [title]" becomes ". "; every shortest `[...]` goes; each double space becomes a
    single one, once:

        "Roof [title] Tools [step] Get  a ladder."  ->  "Roof. Tools Get a ladder."
    """
    text = text.strip().replace(" [title]", ". ")
    return _BRACKETS.sub("", text).replace("  ", " ")
