"""The token ids a model and its data agree on."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PADDING_MULTIPLE = 128
# Sixty times as many as the largest vocabularies have: a table of more would be a mistake, or an attack.
MOST_IDS = 1 << 24


class Vocabulary(BaseModel):
    """Special ids and the number of ids in use, the mask id included.

    rows: rows of the embedding that an imported model brought; no text uses those from `size` on.
    bos_id: what every document and prompt begins with, always shown and never counted; None: nothing, as it was before
    there was such a field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size: Annotated[int, Field(ge=2)]
    eos_id: Annotated[int, Field(ge=0)]
    mask_id: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(ge=0)] = 0
    # Left out where there is none, so that what describes such data has the hash that it always had.
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
        """Rows of the embedding and the head, rounded up to a multiple of 128, the same for every topology."""
        return -(-max(self.size, self.rows) // PADDING_MULTIPLE) * PADDING_MULTIPLE
