"""What every JSON object of a request has in common."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from qserve.api.not_served import Neutral


class Wire(BaseModel):
    """A JSON object of a request: types are exact, and `null` means "not given"."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    not_served: ClassVar[Mapping[str, Neutral]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: item for name, item in value.items() if item is not None}
        return value
