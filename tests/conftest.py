"""Models and texts on disk, as a user would have them: tiny, random, made once a test run."""

import atexit
import gc
import json
import logging
import os
import random
import shutil
import sys
import tempfile

import pytest
import torch
import torchvision_on_cpu  # noqa: F401, before transformers imports torchvision
from asked_attributes import pytest_runtest_call  # noqa: F401, pytest finds it here
from browsing import browser  # noqa: F401, pytest finds it here
from exact_names import pytest_collection_modifyitems  # noqa: F401, pytest finds it here
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from attn_plugins.core.checked import cache_folder

# Before a test imports datasets and evaluate, which read them once: tests leave nothing in the user's cache.
CACHE = tempfile.mkdtemp(prefix="attn-plugins-tests-")
os.environ["HF_DATASETS_CACHE"] = CACHE
os.environ["HF_METRICS_CACHE"] = os.path.join(CACHE, "metrics")
os.environ["HF_MODULES_CACHE"] = os.path.join(CACHE, "modules")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
# What auto takes on a CPU does not depend on what a user has built: make test-cpp tests that.
os.environ.setdefault("ATTN_PLUGINS_CPP", "0")

WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "cat",
    "dog",
    "good",
    "bad",
    "fine",
    "poor",
    "the",
    "a",
    "is",
    ".",
]
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

if "ATTN_PLUGINS_TEST_DEVICE" in os.environ:  # for the tests of attentions, see `make gpu-check`
    torch.set_default_device(os.environ["ATTN_PLUGINS_TEST_DEVICE"])


class KillAt(TrainerCallback):
    """Ends a run as Ctrl-C does, after so many steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def on_disk(*parts):
    """A path in the cache, such as ``models/NAME``, with real weights or data; the test is skipped where it is not."""
    path = cache_folder().joinpath(*parts)
    if not (path / "config.json" if parts[0] == "models" else path).exists():
        pytest.skip(f"nothing in {path}; tests marked real need it, in transformers' own format if it is a model")
    return path


def tokenizer(*, encoder=False):
    vocabulary = {word: number for number, word in enumerate([*SPECIAL.values(), *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(SPECIAL)
    if encoder:
        ends = [(name, vocabulary[name]) for name in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def pytest_collection_finish():
    """What is imported and collected stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _drawn_alike():
    """What a test draws without a generator of its own does not depend on what ran before."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _compile_from_scratch():
    """What one test compiled, and for which shapes, is nothing to the next."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def transformers_log(caplog):
    """caplog, hearing transformers' warnings too, each once, whatever other tests and CI have its loggers do.

    They propagate to the root where CI is set, and are silent after a test of what silences them.
    """
    logger = logging.getLogger("transformers")
    before, level = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)
    logger.propagate = before


@pytest.fixture(scope="session")
def interpreted():
    """Triton's kernels run on CPU tensors, for tests that are marked ``kernels``."""
    import interpreter

    interpreter.prepare()


@pytest.fixture
def one_thread(monkeypatch):
    """For models so small that a second thread costs more than it does, in this process and those that it starts."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Folder of a tiny decoder with its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes, **heads, **ids)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """Folder of a tiny encoder without a classifier's head, with its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    easy = {"initializer_range": 0.2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=20, **sizes, **easy, num_attention_heads=2, pad_token_id=3)
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    tokenizer(encoder=True).save_pretrained(folder)
    return str(folder)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """JSONL of 40 texts of 5 to 40 words."""
    chance = random.Random(0)
    rows = [{"text": " ".join(chance.choices(WORDS, k=chance.randint(5, 40)))} for _ in range(40)]
    return write_rows(tmp_path_factory.mktemp("text") / "text.jsonl", rows)


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """Folder of a tiny decoder whose tokens are letters, which a pass key can be made of, and a file of long texts."""
    folder = tmp_path_factory.mktemp("letters")
    printable = ["<s>", "<unk>", *(chr(number) for number in range(32, 127)), "\n"]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(printable)}, [], unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 5, "max_position_embeddings": 512}
    config = LlamaConfig(vocab_size=len(printable), **sizes, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    chance = random.Random(0)
    texts = [{"text": " ".join(chance.choices(WORDS, k=400))} for _ in range(6)]
    return str(folder), write_rows(folder / "text.jsonl", texts)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """JSONL of 120 texts whose first word tells the label."""
    chance = random.Random(0)
    rows = []
    for _ in range(120):
        word, label = chance.choice([("good", "plus"), ("bad", "minus"), ("is", "none")])
        words = chance.choices(["the", "a", "cat", "dog", "one"], k=chance.randint(2, 12))
        rows.append({"text": " ".join([word, *words]), "label": label})
    return write_rows(tmp_path_factory.mktemp("labelled") / "labelled.jsonl", rows)


@pytest.fixture(scope="module")
def built():
    """The instruction sets that compiled kernels are there for, the one in use first."""
    from attn_plugins.backends import cpp, cpp_build

    library = cpp_build.built()
    if os.environ["ATTN_PLUGINS_CPP"] == "0":
        pytest.skip("compiled kernels are left alone: make test-cpp")
    assert library is not None, "the kernels are not built"
    cpp.load(str(library))
    return cpp.instruction_sets()


@pytest.fixture(params=["avx512", "avx2", "generic"])
def isa(request, built):
    """Each instruction set in turn, in use."""
    from attn_plugins.backends import cpp

    if request.param not in built:
        pytest.skip(f"this machine has no {request.param}")
    cpp.use_instruction_set(request.param)
    yield request.param
    cpp.use_instruction_set(built[0])
