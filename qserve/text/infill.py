"""Text that is filled in between a prompt and a suffix, by models that were trained to do so.

Such a model has tokens for the three places, and reads: before, prompt, after, suffix, between; then it writes what
stands between. Which tokens they are is a table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class InfillFormat:
    before: str
    after: str
    between: str


INFILL_FORMATS: tuple[InfillFormat, ...] = (
    InfillFormat(before="<|fim_prefix|>", after="<|fim_suffix|>", between="<|fim_middle|>"),
    InfillFormat(before="<fim_prefix>", after="<fim_suffix>", between="<fim_middle>"),
    InfillFormat(before="<fim-prefix>", after="<fim-suffix>", between="<fim-middle>"),
    InfillFormat(before="<｜fim▁begin｜>", after="<｜fim▁hole｜>", between="<｜fim▁end｜>"),
    InfillFormat(before="▁<PRE>", after="▁<SUF>", between="▁<MID>"),
)


def infill(
    prompt: Sequence[int], suffix: Sequence[int], *, token_to_id: Callable[[str], int | None]
) -> list[int] | None:
    """The ids of a prompt that asks for what stands between; None where the model has no tokens for it."""
    for form in INFILL_FORMATS:
        ids = [token_to_id(token) for token in (form.before, form.after, form.between)]
        before, after, between = ids
        if before is not None and after is not None and between is not None:
            return [before, *prompt, after, *suffix, between]
    return None
