"""How long a candidate's greedy continuations stay equal to the baseline's.

One token that differs changes all that follow, so only the leading equal tokens count. A
difference early on is not yet a fault: two nearly equal probabilities may change places by
rounding. It says what a user would notice.
"""

from collections.abc import Sequence
from itertools import takewhile

from hasten.errors import RuntimeFailedError
from hasten.request import Request, SamplingParams
from hasten.runtimes.process import RuntimeProcess

TokenIds = tuple[int, ...]


def generate_greedily(process: RuntimeProcess, prompts: Sequence[TokenIds], num_tokens: int) -> tuple[TokenIds, ...]:
    """Exactly num_tokens tokens after each prompt, end tokens ignored.

    Raises:
        RuntimeFailedError: a prompt got an error or another number of tokens.
    """
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    requests = [Request(f"greedy-{index}", prompt, sampling) for index, prompt in enumerate(prompts)]
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    at_once = process.config.max_num_seqs
    for start in range(0, len(requests), at_once):
        for event in process.generate(requests[start : start + at_once]):
            if event.error is not None:
                raise RuntimeFailedError(f"greedy decoding failed: {event.error}")
            if event.token_id is not None:
                tokens[event.request_id].append(event.token_id)
    for each in tokens.values():
        if len(each) != num_tokens:
            raise RuntimeFailedError(f"greedy decoding gave {len(each)} tokens, {num_tokens} were asked for")
    return tuple(tuple(each) for each in tokens.values())


def num_leading_equal(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
