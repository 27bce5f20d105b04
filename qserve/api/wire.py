"""What every JSON object of a request has in common."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from qserve.api.not_served import Neutral
from qserve.errors import InvalidRequest


class Wire(BaseModel):
    """A JSON object of a request: types are exact, and `null` means "not given"."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    not_served: ClassVar[Mapping[str, Neutral]] = {}

    def refuse(self, *names: str, because: str, param: str = "") -> None:
        """Raises for the first of these fields that asks for something, for it would be without effect.

        `param` is where this object stands in the request, with a point behind.
        """
        fields = type(self).model_fields
        given = next((name for name in names if getattr(self, name) != fields[name].get_default()), None)
        if given is not None:
            given = param + (fields[given].alias or given)
            raise InvalidRequest(f"{given} would have no effect {because}; leave it out.", param=given)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: item for name, item in value.items() if item is not None}
        return value
