"""Captured decoding steps, with a capture that calls the step again: on a CPU there are no CUDA graphs."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from support.decoding import compare, make_model
from support.golden import CHECKPOINT, GOLDEN
from support.models import ARCHITECTURES, load_golden
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.inference import compilation, cuda_graphs
from yivl.inference.chat import Chat, GenerationState
from yivl.inference.cuda_graphs import Buffers, CudaCapture, DecodingGraphs, can_capture, static_step
from yivl.inference.decoding import decode_head, decode_layer
from yivl.inference.engine import Engine, decode, finish_together
from yivl.inference.kv_cache import PrefixStore, make_cache
from yivl.model.modeling import YiVLForCausalLM

WIDE = GOLDEN / "images/wide_rgb.png"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 24}
QUESTIONS = [
    ("What is this?", WIDE),
    ("hello", None),
    ("Tell me a long story about it.", WIDE),
    ("你好", None),
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """Tests must not modify it."""
    return load_golden(request.param)


class FakeCapture:
    """Captures steps; the buffer of the output is overwritten by each call, as on a GPU."""

    def __init__(self) -> None:
        self.outputs: list[torch.Tensor] = []
        self.num_calls = 0

    def __call__(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        output: list[torch.Tensor] = []

        def replay() -> torch.Tensor:
            self.num_calls += 1
            logits = step()
            if not output:
                output.append(torch.empty_like(logits))
                self.outputs.append(output[0])
            for other in self.outputs:
                other.fill_(torch.nan)  # the graphs share memory
            return output[0].copy_(logits)

        return replay


@pytest.fixture
def capture_step() -> FakeCapture:
    return FakeCapture()


def with_graphs(loaded: LoadedModel, capture_step: FakeCapture) -> LoadedModel:
    graphs = DecodingGraphs(loaded.model, (decode_layer, decode_head), capture_step)
    return dataclasses.replace(loaded, decoding_graphs=graphs)


@pytest.fixture
def graphed(loaded: LoadedModel, capture_step: FakeCapture, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """The golden model, whose steps are captured for few positions at a time: answers need several graphs."""
    monkeypatch.setattr(cuda_graphs, "BUCKET", 16)
    return with_graphs(loaded, capture_step)


def shapes(loaded: LoadedModel) -> list[tuple[int, int]]:
    """Return rows and capacity of the graphs that are kept."""
    assert loaded.decoding_graphs is not None
    return list(loaded.decoding_graphs._graphs)


def begin(loaded: LoadedModel, index: int, **sampling: Any) -> GenerationState:
    return Chat(loaded).begin(*QUESTIONS[index], **GREEDY | sampling)


@pytest.mark.parametrize("lengths", [[9], [9, 9], [12, 3, 7], [15, 16, 1, 2, 3]])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_key_value_heads": 1, "head_dim": 8, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    ],
)
def test_logits_are_those_of_the_model(
    shape: dict[str, Any],
    lengths: list[int],
    loaded: LoadedModel,
    capture_step: FakeCapture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_graphs, "BUCKET", 16)
    model = with_graphs(make_model(loaded, **shape), capture_step)
    compare(model, lengths, num_steps=20)
    assert capture_step.num_calls == 20
    rows = {1: 1, 2: 2, 3: 4, 5: 8}[len(lengths)]
    assert shapes(model) == [(rows, 16), (rows, 32), (rows, 48)][max(lengths) // 16 : (max(lengths) + 19) // 16 + 1]


def test_an_answer_over_several_graphs_is_that_without_them(
    graphed: LoadedModel, loaded: LoadedModel, capture_step: FakeCapture
) -> None:
    sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": 60}
    assert Chat(graphed).ask("hello", **sampling) == Chat(loaded).ask("hello", **sampling)
    assert capture_step.num_calls == 59
    assert len(shapes(graphed)) >= 4


def test_requests_join_and_leave(graphed: LoadedModel, loaded: LoadedModel, capture_step: FakeCapture) -> None:
    engine, states = Engine(graphed), list[GenerationState]()
    for index, _ in enumerate(QUESTIONS):
        states.append(begin(graphed, index, max_new_tokens=6 + 5 * index))
        engine.add(states[-1])
        engine.step()
    engine.remove([states[1]])
    num_steps = len(QUESTIONS)
    while len(engine):
        engine.step()
        num_steps += 1
    assert capture_step.num_calls == num_steps
    for index, state in enumerate(states):
        alone = Chat(loaded).begin(*QUESTIONS[index], temperature=0, max_new_tokens=len(state.new_ids))
        assert finish_together(loaded, [alone])
        assert state.new_ids == alone.new_ids
    assert {rows for rows, _ in shapes(graphed)} == {1, 2, 4}


def test_streams_that_take_turns_do_not_mix(graphed: LoadedModel, loaded: LoadedModel) -> None:
    """Two batches have one memory: each moves there before its step, and keeps its own keys and values."""
    states = [begin(graphed, index) for index in (0, 1)]
    streams = [decode(graphed, state) for state in states]
    texts = ["", ""]
    for _ in range(30):
        for index, stream in enumerate(streams):
            texts[index] += next(stream, "")
    assert texts == [Chat(loaded).ask(*QUESTIONS[index], **GREEDY) for index in (0, 1)]


def test_stored_prefixes_are_copies_of_the_memory_of_the_graphs(graphed: LoadedModel, loaded: LoadedModel) -> None:
    prefixes, texts = PrefixStore(1 << 30), []
    questions = ("What is this?", "What is this", "What is this? And why?")
    for question in questions:
        state = Chat(graphed).begin(question, WIDE, **GREEDY)
        texts.append("".join(decode(graphed, state, prefixes)))
    assert state.num_cached > 0
    expected = [
        Chat(loaded).ask(q, WIDE, **GREEDY) for q in ("What is this?", "What is this", "What is this? And why?")
    ]
    assert texts == expected


def test_keys_that_are_not_finite_stay_with_their_request(graphed: LoadedModel, loaded: LoadedModel) -> None:
    """Graphs read positions behind the last one, whose weight is 0: they must not be left from another request."""
    engine = Engine(graphed)
    engine.add(begin(graphed, 2))
    engine.step()
    assert engine._cache is not None
    with torch.inference_mode():
        for layer in engine._cache.layers:
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)
    engine.clear()
    assert Chat(graphed).ask(*QUESTIONS[1], **GREEDY) == Chat(loaded).ask(*QUESTIONS[1], **GREEDY)


def test_graphs_are_kept_until_others_were_used_since(
    graphed: LoadedModel, capture_step: FakeCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    graphs = graphed.decoding_graphs
    assert graphs is not None
    with torch.inference_mode():
        first = graphs.prepare(1, 16)
        graphs.prepare(1, 17)
        assert graphs.prepare(1, 5) is first
        graphs.prepare(1, 33)
    assert shapes(graphed) == [(1, 16), (1, 48)]


def test_more_rows_than_memory_drop_the_graphs_and_no_keys(graphed: LoadedModel, loaded: LoadedModel) -> None:
    context = loaded.model.config.max_position_embeddings
    graphs = graphed.decoding_graphs
    assert graphs is not None
    engine, state = Engine(graphed), begin(graphed, 0)
    engine.add(state)
    engine.step()
    with torch.inference_mode():
        graphs.prepare(4, context)
    assert shapes(graphed) == [(4, context)]
    while len(engine):
        engine.step()
    assert state.text == Chat(loaded).ask(*QUESTIONS[0], **GREEDY)


class OutOfMemory(TorchDispatchMode):
    """Lets all allocations for graphs and copies of keys and values fail after the first ones."""

    def __init__(self, num_allocations: int) -> None:
        super().__init__()
        self.num_left = num_allocations

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_copy = function is torch.ops.aten.clone.default and args[0].ndim == 4
        if is_copy or function is torch.ops.aten.new_zeros.default:
            self.num_left -= 1
            if self.num_left < 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("num_steps", [0, 20])
def test_an_answer_continues_without_graphs_if_there_is_no_memory_for_them(
    num_steps: int, graphed: LoadedModel, loaded: LoadedModel, capture_step: FakeCapture
) -> None:
    engine, state = Engine(graphed), begin(graphed, 1, max_new_tokens=60)
    engine.add(state)
    for _ in range(num_steps):
        engine.step()
    with OutOfMemory(3):  # in the middle of the layers
        while len(engine):
            engine.step()
    assert num_steps <= capture_step.num_calls < num_steps + 16
    assert shapes(graphed) == []
    assert state.text == Chat(loaded).ask(*QUESTIONS[1], temperature=0, max_new_tokens=60)


def test_a_refused_capture_is_reported_once_and_not_tried_again(
    graphed: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[Callable[[], torch.Tensor]] = []

    def refuse(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        tried.append(step)
        raise RuntimeError(
            "operation not permitted when stream is capturing\nCUDA kernel errors might be reported late"
        )

    graphs = DecodingGraphs(graphed.model, (decode_layer, decode_head), refuse)
    refused = dataclasses.replace(graphed, decoding_graphs=graphs)
    expected = finish_together(
        dataclasses.replace(graphed, decoding_graphs=None), [begin(graphed, 0), begin(graphed, 1)]
    )
    for _ in range(2):
        assert finish_together(refused, [begin(graphed, 0), begin(graphed, 1)]) == expected
    assert len(tried) == 1
    assert [record.message for record in caplog.records] == [
        "decoding without CUDA graphs: operation not permitted when stream is capturing"
    ]
    assert not graphs.num_bytes


def test_an_idle_engine_gives_the_memory_of_the_graphs_back(graphed: LoadedModel) -> None:
    graphs, engine = graphed.decoding_graphs, Engine(graphed)
    assert isinstance(graphs, DecodingGraphs)
    engine.add(begin(graphed, 1))
    engine.step()
    assert graphs.num_bytes
    assert not engine.free_memory()  # no prefixes, and the graphs are in use
    engine.clear()
    assert engine.free_memory()
    assert not graphs.num_bytes
    assert not engine.free_memory()


def test_the_memory_of_a_finished_request_is_not_kept_by_its_owner(graphed: LoadedModel) -> None:
    graphs, cache = graphed.decoding_graphs, make_cache()
    assert graphs is not None
    with torch.inference_mode():
        graphed.model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)
        graphs.adopt(cache, [2])
    assert graphs.owns(cache)
    del cache
    assert graphs._owner() is None


def test_models_whose_steps_wait_for_results_are_not_captured(loaded: LoadedModel) -> None:
    assert can_capture(loaded.model)
    model = make_model(loaded).model
    assert can_capture(model)
    model.is_loaded_in_8bit = True
    assert not can_capture(model)
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    assert not can_capture(make_model(loaded, rope_parameters=dynamic).model)
    assert not can_capture(make_model(loaded).model.train())


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (4, torch.bfloat16)])
def test_a_step_neither_waits_for_the_gpu_nor_mixes_devices(rows: int, dtype: torch.dtype, loaded: LoadedModel) -> None:
    with torch.device("meta"):
        model = YiVLForCausalLM(loaded.model.config).to(dtype).eval()
    with FakeTensorMode(), torch.inference_mode():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")  # type: ignore[assignment]
        config = model.config
        shape = (rows, config.num_key_value_heads, 512, config.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device="cuda") for _ in range(2))
        buffers = Buffers.allocate([(keys, values)] * config.num_hidden_layers)
        buffers.start([7, 3][:rows])
        logits = static_step(model, (decode_layer, decode_head), buffers)
        assert (logits.shape, logits.dtype, logits.device.type) == ((rows, config.vocab_size), dtype, "cuda")
        with pytest.raises(Exception, match=r"aten\._local_scalar_dense"):
            buffers.slot.item()
        mixed = dataclasses.replace(buffers, padding=torch.zeros(rows, 1, 1, 1, dtype=torch.int64))
        with pytest.raises(Exception, match=r"[Dd]evice"):
            static_step(model, (decode_layer, decode_head), mixed)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What compilation logs."""
    lines: list[str] = []
    monkeypatch.setattr(compilation.logger, "info", lambda line, *values: lines.append(line % values))
    return lines


def test_a_model_is_captured_once_before_the_first_request(
    loaded: LoadedModel, lines: list[str], capture_step: FakeCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "CudaCapture", lambda device: capture_step)
    functions = (decode_layer, decode_head)
    with torch.inference_mode():
        graphs = compilation._capture(loaded.model, *functions, functions)
    graphed = dataclasses.replace(loaded, decoding_graphs=graphs)
    assert shapes(graphed) == [(1, 1536)]
    assert Chat(graphed).ask(*QUESTIONS[1], **GREEDY) == Chat(loaded).ask(*QUESTIONS[1], **GREEDY)
    assert (lines, capture_step.num_calls) == ([], GREEDY["max_new_tokens"] - 1)


@pytest.mark.parametrize("reason", ["operation not permitted when stream is capturing", "CUDA out of memory."])
def test_a_gpu_that_cannot_capture_steps_is_one_line(
    reason: str, loaded: LoadedModel, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        raise torch.OutOfMemoryError(reason + "\nSearch for it")

    monkeypatch.setattr(compilation, "CudaCapture", lambda device: fail)
    functions = (decode_layer, decode_head)
    with torch.inference_mode():
        assert compilation._capture(loaded.model, *functions, functions) is None
    assert lines == ["decoding without CUDA graphs: " + reason]


def test_a_model_that_cannot_be_captured_is_one_line(loaded: LoadedModel, lines: list[str]) -> None:
    model = make_model(loaded).model
    model.is_loaded_in_8bit = True
    functions = (decode_layer, decode_head)
    assert compilation._capture(model, *functions, functions) is None
    assert lines == ["decoding without CUDA graphs: 8-bit layers or dynamic position embeddings wait for the GPU"]


def test_graphs_share_the_memory_pool_of_those_that_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle of a pool whose graphs are gone is an error in PyTorch."""
    pools, signature = list[Any](), inspect.signature(torch.cuda.graph)

    class Graph:
        num_replays = 0

        def pool(self) -> "Graph":
            return self

        def replay(self) -> None:
            self.num_replays += 1

    @contextmanager
    def record(graph: Graph, **keywords: Any) -> Iterator[None]:
        signature.bind(graph, **keywords)
        assert keywords["capture_error_mode"] == "thread_local"
        pools.append(keywords["pool"])
        yield

    capture = mock_cuda(monkeypatch, Graph, record)
    logits = torch.ones(1)
    first = capture(lambda: logits)
    second = capture(lambda: logits)
    assert first() is logits
    assert pools[0] is None
    assert pools[1].num_replays == 1
    del first, second
    pools.clear()
    capture(lambda: logits)
    assert pools == [None]


def test_a_refused_capture_raises_the_error_of_the_step_on_the_stream_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The end of such a capture fails, too, and PyTorch does not return to the stream before."""
    streams = list[Any]()

    @contextmanager
    def record(graph: Any, **_: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def refuse() -> torch.Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    capture = mock_cuda(monkeypatch, object, record)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        capture(refuse)
    with pytest.raises(RuntimeError, match="due to a previous error"):
        capture(lambda: torch.ones(1))
    assert streams == ["current stream"] * 2


def mock_cuda(monkeypatch: pytest.MonkeyPatch, graph: Any, record: Any) -> CudaCapture:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current stream")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return CudaCapture(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_graphs_on_a_gpu_give_the_answers_of_the_model(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after requests have joined and left, in float32, where rounding changes no token."""
    set_stance = torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda _: set_stance("fail_on_recompile"))
    model = load_model(CHECKPOINT, device="cuda:0", dtype="float32")
    compiled = compilation.compile_decoding(model)
    assert len(lines) == 1, lines
    monkeypatch.setattr(cuda_graphs, "BUCKET", 64)
    assert compiled.decoding_graphs is not None
    for sampling in ({"temperature": 0, "max_new_tokens": 200}, {"temperature": 1.5, "seed": 1, "max_new_tokens": 200}):
        assert Chat(compiled).ask(*QUESTIONS[0], **sampling) == Chat(model).ask(*QUESTIONS[0], **sampling)
    engine, states = Engine(compiled), list[GenerationState]()
    for index, _ in enumerate(QUESTIONS):
        states.append(begin(compiled, index, max_new_tokens=6 + 5 * index))
        engine.add(states[-1])
        engine.step()
    while len(engine):
        engine.step()
    assert [state.text for state in states] == [
        Chat(model).ask(*question, temperature=0, max_new_tokens=6 + 5 * index)
        for index, question in enumerate(QUESTIONS)
    ]
    assert {rows for rows, _ in shapes(compiled)} == {1, 2, 4}
