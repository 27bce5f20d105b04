"""What the engine has done and how full it is, as plain numbers for whoever counts."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Stats:
    """The first group tells the present, the second everything since the start."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_held_blocks: int = 0

    num_steps: int = 0
    num_computed_tokens: int = 0  # positions, those computed again after a preemption among them
    num_prompt_tokens: int = 0  # of requests that were admitted
    num_cached_tokens: int = 0  # of these, found in the prefix cache
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    num_aborted: int = 0
