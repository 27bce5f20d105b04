"""How tokens are drawn and when they end: what every endpoint takes that generates."""

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field

from qserve.api.wire import Wire
from qserve.engine.request import SamplingParams
from qserve.errors import InvalidRequest

_MAX_STOPS = 64
_MAX_STOP_LENGTH = 1000


def _check_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("expected a string or a list of strings")
    if len(stops) > _MAX_STOPS or any(not 0 < len(stop) <= _MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"at most {_MAX_STOPS} stop strings are taken, each of 1 to {_MAX_STOP_LENGTH} characters")
    return stops


Stops: TypeAlias = Annotated[list[str], BeforeValidator(_check_stop, json_schema_input_type=str | list[str])]


def _check_bias(value: Any) -> Any:
    """OpenAI writes token ids as strings here, for JSON has no other keys."""
    if not isinstance(value, dict) or not all(str(key).isdecimal() and len(str(key)) < 12 for key in value):
        raise ValueError("expected an object from token ids to numbers")
    return {int(key): bias for key, bias in value.items()}


Bias: TypeAlias = Annotated[float, Field(ge=-100, le=100)]


class SamplingRequest(Wire):
    """OpenAI's fields and vLLM's, under one name at every endpoint."""

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    typical_p: float = Field(1.0, gt=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logit_bias: Annotated[dict[int, Bias], BeforeValidator(_check_bias, json_schema_input_type=dict[str, Bias])] = (
        Field({})
    )
    allowed_token_ids: list[int] | None = Field(None, min_length=1)
    stop_token_ids: list[int] = Field([])
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    skip_special_tokens: bool = True
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False)  # seconds; what there is by then is the answer

    def sampling(self, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        if self.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, more than the {max_tokens} tokens that may be made.",
                param="min_tokens",
            )
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            typical_p=self.typical_p,
            logit_bias=self.logit_bias,
            allowed_token_ids=None if self.allowed_token_ids is None else frozenset(self.allowed_token_ids),
            seed=self.seed,
            stop_token_ids=frozenset(self.stop_token_ids),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
