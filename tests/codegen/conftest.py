from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from delivered import deliver


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: more threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def delivery(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A delivered directory by its name in `delivered`, written once; not to be changed."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = deliver(name, tmp_path_factory.mktemp("delivery"))
        return made[name]

    return find
