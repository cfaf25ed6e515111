"""What tests of several folders need: a tiny teacher, the signals of a program in a terminal, an order."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.texts import save_tokenizer

# As the command has it: threads that wait sleep. On a busy machine a stage of two threads otherwise waits most of the
# time: a killed and resumed one took 29 s of a processor, and so 10. Read when torch is loaded, which comes later.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

TEXT = [f"def f{i}(x):\n    return x + {i}\n\n\nprint(f{i}({i}))\n" for i in range(60)]


@pytest.fixture(scope="session", autouse=True)
def own_signals() -> Iterator[None]:
    """Neither the tests nor the processes that they start ignore or hold back what this process inherited so.

    A shell starts `make test &` with SIGINT ignored, and what is ignored is so in every child.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ignored = [number for number in usual if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, usual[number])
    held = signal.pthread_sigmask(signal.SIG_UNBLOCK, usual)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, held)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="session", autouse=True)
def own_environment() -> Iterator[None]:
    """Neither the tests nor what they start go where the user's own studies and records are."""
    own = pytest.MonkeyPatch()
    for name in ("LAYERSWAP_HOME", "LAYERSWAP_TRACKING_URI", "MLFLOW_TRACKING_URI"):
        own.delenv(name, raising=False)
    yield
    own.undo()


@pytest.fixture(autouse=True)
def core_as_found() -> Iterator[None]:
    """A test that leaves the compiled core in use fails: those after it would compute other bits."""
    yield
    native = sys.modules.get("operators.native")
    if native is not None and native.in_use():
        native.use(False)
        pytest.fail("this test left the compiled core in use: see operators.native.as_found")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start a cluster, or have a time limit of their own, come first, then those of this folder, which have
    whole commands: tests run in two processes, file by file, and what takes minutes must not be left for the end."""
    long = {item.path for item in items if item.get_closest_marker("ray") or item.get_closest_marker("timeout")}
    items.sort(key=lambda item: (item.path not in long, len(item.path.parts)))


def pytest_collection() -> None:
    """No garbage is looked for while tests are collected: nearly all that is made stays."""
    gc.disable()


def pytest_collection_finish() -> None:
    """From now on garbage is looked for among what tests make, and not among 850,000 objects of modules and of tests:
    half a second for each stage that a test computes in this process, for stages end with a collection."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random GPT-NeoX of 3 layers, width 32 and 4 heads, with a tokenizer of 300 entries."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    folder = tmp_path_factory.mktemp("teacher")
    save_tokenizer(folder, TEXT, 300)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=96, initializer_range=0.2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms as a trained model has them
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder
