"""Several processes, started by torchrun, talk over gloo; see `support/ranks.py`.

What is checked lies in the scripts, many checks per start.
"""

import re

import pytest
import ranks

pytestmark = pytest.mark.ranks


def test_two_ranks_give_what_one_process_gives() -> None:
    ranks.run_checks("checks_models_two.py", 2)


@pytest.mark.slow
def test_four_ranks_give_what_one_process_gives() -> None:
    ranks.run_checks("checks_four.py", 4)


def test_a_rank_that_dies_or_differs_is_an_error_within_the_timeout() -> None:
    processes = ranks.start("failing.py", 2)
    outputs = [process.communicate(timeout=ranks.LIMIT)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 3], outputs
    seen = [re.findall(r"(\w+): (\w+) after ([\d.]+) s", output) for output in outputs]
    assert [[what for what, _, _ in one] for one in seen] == [["disagree", "die"], ["disagree"]]
    for _, _, seconds in seen[0] + seen[1]:
        assert float(seconds) < 10, outputs
