"""Define the token ids that a model and its data share."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PADDING_MULTIPLE = 128
# The largest vocabularies have about 2^18 ids. A table of more than 2^24 rows would be a mistake, or an attack.
MOST_IDS = 1 << 24


class Vocabulary(BaseModel):
    """Special ids and the number of ids in use, the mask id included.

    Attributes:
        size: ids in use, the mask id included.
        eos_id: the end of a document.
        mask_id: the mask.
        rows: rows of the embedding of an imported model, which may have more than ids in use; 0: as many as `size`.
        bos_id: the first token of every document and prompt, always visible and never counted; None: there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size: Annotated[int, Field(ge=2)]
    eos_id: Annotated[int, Field(ge=0)]
    mask_id: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(ge=0)] = 0
    # Left out of a dump where it is None: data that were prepared before this field existed keep their hash.
    bos_id: Annotated[int | None, Field(ge=0, exclude_if=lambda value: value is None)] = None

    @model_validator(mode="after")
    def _ids_are_distinct_and_in_range(self) -> Self:
        if max(self.size, self.rows) > MOST_IDS:
            raise ValueError(
                f"a vocabulary of {max(self.size, self.rows):,} ids has more than the {MOST_IDS:,} allowed"
            )
        for name, value in (("eos_id", self.eos_id), ("mask_id", self.mask_id), ("bos_id", self.bos_id or 0)):
            if value >= self.size:
                raise ValueError(f"{name}={value} is outside the vocabulary of {self.size} ids (0 to {self.size - 1})")
        if self.mask_id in (self.eos_id, self.bos_id):
            name = "eos_id" if self.eos_id == self.mask_id else "bos_id"
            raise ValueError(f"{name} and mask_id are both {self.mask_id}; the mask needs an id that no text uses")
        return self

    @property
    def padded_size(self) -> int:
        """Return the rows of the embedding and the head: a multiple of 128, the same for every layout."""
        return -(-max(self.size, self.rows) // PADDING_MULTIPLE) * PADDING_MULTIPLE
