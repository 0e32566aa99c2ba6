"""On simulated CUDA devices everything computes what it does on the CPU, and nothing mixes devices."""

import copy
import dataclasses
import queue
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from support.devices import DeviceTensor, SimulatedCuda
from support.golden import CHECKPOINT, GOLDEN
from support.golden_internvl import golden_model as internvl_model
from support.training import IMAGES, conversation, losses, train, write_rows
from torch.nn import functional

from yivl.checkpoint.adapters import save_adapter
from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.data.collator import Collator, normalize_images
from yivl.data.encoding import Sample
from yivl.eval.benchmarks.benchmark import Question
from yivl.eval.runner import answer_questions
from yivl.image_processing import ImageProcessor, load_image
from yivl.inference import engine
from yivl.inference.chat import Chat, answer_batch
from yivl.inference.engine import Engine
from yivl.inference.kv_cache import PrefixStore
from yivl.inference.sampling import Sampler, Sampling
from yivl.model.attention import register_packed_sdpa
from yivl.serve.images import SentImage
from yivl.serve.limits import Limits
from yivl.serve.scheduler import Event, Request, Scheduler

PHOTO, WIDE = GOLDEN / "images/photo_rgb.jpg", GOLDEN / "images/wide_rgb.png"
SHORT: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4}
CUDA, HOST = torch.device("cuda:1"), torch.device("cpu")
"""``cuda`` alone means another device, so that a tensor made there by mistake is found, too."""


@pytest.fixture(scope="module")
def simulation() -> SimulatedCuda:
    return SimulatedCuda(2)


@pytest.fixture
def cuda(simulation: SimulatedCuda) -> Iterator[SimulatedCuda]:
    with simulation:
        simulation.transfers.clear()
        yield simulation


@pytest.fixture(scope="module")
def on_cuda(simulation: SimulatedCuda) -> LoadedModel:
    with simulation:
        return Chat.from_pretrained(CHECKPOINT, device="cuda:1").loaded


Operation = Callable[[torch.Tensor, torch.Tensor], object]
"""Of a ``(2, 3)`` tensor on the device and one on the host."""

REFUSED: dict[str, Operation] = {
    "sum": lambda device, host: device + host,
    "two devices": lambda device, host: device + device.to("cuda:0"),
    "in-place": lambda device, host: host.add_(device),
    "mask": lambda device, host: device.masked_fill(host > 0, 0),
    "concatenation": lambda device, host: torch.cat([device, host]),
    "scalar in a product": lambda device, host: device @ host[0],
    "scalar in a concatenation": lambda device, host: torch.stack([device[0, 0], host[0, 0]]),
    "host indexed by device": lambda device, host: host[device[0].long()],
    "embedding": lambda device, host: functional.embedding(host[0].long(), device),
    "linear layer": lambda device, host: functional.linear(host, device),
    "attention mask": lambda device, host: functional.scaled_dot_product_attention(device, device, device, host[:, :2]),
    "generator": lambda device, host: device.multinomial(1, generator=torch.Generator()),
    "generator of another device": lambda device, host: host.multinomial(1, generator=torch.Generator("cuda")),
    "data": lambda device, host: setattr(device, "data", host),
    "module": lambda device, host: torch.nn.Linear(3, 2)(device),
}
ALLOWED: dict[str, Operation] = {
    "scalar": lambda device, host: device * host[0, 0],
    "where": lambda device, host: torch.where(device > 0, device, host[0, 0]),
    "indices": lambda device, host: device[host[0].long().clamp(max=1)],
    "assignment": lambda device, host: device.clone().index_put_((host[0, :2].long() * 0,), device[0] * 2),
    "masked assignment": lambda device, host: device.masked_fill(device > 1, host[0, 0]),
    "copy": lambda device, host: torch.zeros_like(device).copy_(host),
    "slice": lambda device, host: device.new_zeros(3, 3)[1:].add_(device),
    "tensor": lambda device, host: torch.tensor([1.0, 2.0], device=device.device) + device[:, 0],
    "factory": lambda device, host: torch.arange(3, device="cuda:1") + device,
    "list": lambda device, host: torch.tensor(device.tolist()),
    "move": lambda device, host: host.to(1) + host.cuda(1) + device.to(host).to(device),
    "generator": lambda device, host: device.multinomial(1, generator=torch.Generator(device.device).manual_seed(1)),
}


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    host = torch.tensor([[1.0, 2.0, 1.0], [0.5, 1.0, 2.0]])
    return host.to(CUDA), host


@pytest.mark.parametrize("inference", [False, True])
def test_operations_on_two_devices_are_those_that_cuda_takes(inference: bool, cuda: SimulatedCuda) -> None:
    for name, operation in REFUSED.items():
        with torch.inference_mode(inference), pytest.raises(RuntimeError, match="device"):
            pytest.fail(f"{name}: {operation(*operands())}")
    for name, operation in ALLOWED.items():
        with torch.inference_mode(inference):
            result, (_, host) = operation(*operands()), operands()
            expected = operation(host, host) if name not in ("factory", "move", "generator") else None
        assert name == "list" or isinstance(result, DeviceTensor), name
        if expected is not None:
            torch.testing.assert_close(_to_host(result), expected, msg=name)
    with pytest.raises(TypeError, match="numpy"):
        operands()[0].numpy()


def _to_host(value: Any) -> torch.Tensor:
    return value.cpu()


def test_copies_between_devices_are_counted(cuda: SimulatedCuda) -> None:
    device, host = operands()
    device[:, 1:] = host[:, 1:]
    assert float(device.sum()) == host.sum()
    device.to(torch.float64)
    assert cuda.transfers == {("cpu", "cuda"): 2, ("cuda", "cpu"): 1}


def test_outside_of_the_block_nothing_is_simulated() -> None:
    before = torch.cuda.is_available(), torch.cuda.device_count(), torch.Generator
    with SimulatedCuda(3) as simulation, simulation:
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 3
        kept = torch.ones(2, device="cuda:2")
    assert (torch.cuda.is_available(), torch.cuda.device_count(), torch.Generator) == before
    weight = torch.ones(2, requires_grad=True)
    (weight * 2).sum().backward()
    assert weight.grad is not None
    with pytest.raises(RuntimeError, match=r"found cpu, cuda:2"):  # as in another thread
        kept + torch.ones(2)


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_mask": torch.ones(2, 5, dtype=torch.int64)},
        {"position_ids": torch.arange(5).expand(2, 5)},
        {"input_ids": torch.ones(2, 5, dtype=torch.int64)},
        {"labels": torch.ones(2, 5, dtype=torch.int64)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_tensor_of_the_host_in_the_model_is_found(
    fields: dict[str, torch.Tensor], cuda: SimulatedCuda, on_cuda: LoadedModel
) -> None:
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.int64, device=CUDA)} | fields
    with torch.inference_mode(), pytest.raises(RuntimeError, match="same device"):
        on_cuda.model(**inputs)


def test_a_model_is_placed_on_the_device(cuda: SimulatedCuda, on_cuda: LoadedModel) -> None:
    model = on_cuda.model
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {name for name, tensor in tensors.items() if tensor.device != CUDA} == set()
    assert cuda.transfers["cuda", "cpu"] == 0


def test_a_model_is_moved_to_the_device_and_cast_at_once(cuda: SimulatedCuda, loaded: LoadedModel) -> None:
    model = copy.deepcopy(loaded.model).to(CUDA, torch.bfloat16)
    assert {(tensor.device, tensor.dtype) for tensor in model.parameters()} == {(CUDA, torch.bfloat16)}
    frequencies = list(model.model.rotary_emb.buffers())
    assert {(tensor.device, tensor.dtype) for tensor in frequencies} == {(CUDA, torch.float32)}


def conversation_of(loaded: LoadedModel, **sampling: Any) -> list[str]:
    chat = Chat(loaded)
    answers = [chat.ask("What is this?", PHOTO, **sampling), chat.ask("And these?", [WIDE, PHOTO], **sampling)]
    return [*answers, "".join(chat.retry(**sampling))]


def test_a_chat_over_turns_with_several_images(cuda: SimulatedCuda, on_cuda: LoadedModel, loaded: LoadedModel) -> None:
    assert conversation_of(on_cuda, **SHORT) == conversation_of(loaded, **SHORT)


def test_beam_search(cuda: SimulatedCuda, on_cuda: LoadedModel, loaded: LoadedModel) -> None:
    asked: dict[str, Any] = {"num_beams": 3, "temperature": 0.7, "seed": 1, "max_new_tokens": 4}
    assert Chat(on_cuda).ask("And now?", WIDE, **asked) == Chat(loaded).ask("And now?", WIDE, **asked)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 3.0},
        {"temperature": 1.5, "top_k": 0},
        {"temperature": 1.5, "seed": 3, "top_p": 0.6, "top_k": 7, "repetition_penalty": 0.5},
    ],
    ids=str,
)
def test_sampling(settings: dict[str, Any], cuda: SimulatedCuda) -> None:
    """All tokens and their checks are one copy to the host."""
    logits, tokens = torch.randn(6, 1, 40), {}
    for device in (HOST, CUDA):
        torch.manual_seed(5)
        sampler = Sampler(Sampling(**settings), [3, -200, 7], device)
        rows = list(logits.to(device))
        cuda.transfers.clear()
        tokens[device] = torch.stack([sampler.propose(row) for row in rows]).tolist()
    assert tokens[CUDA] == tokens[HOST]
    assert cuda.transfers == {("cuda", "cpu"): 1}


def answers_of_a_batch(loaded: LoadedModel) -> tuple[list[str], Engine]:
    """Return the answers to requests that join and leave, with padding; the last one shares a prefix."""
    batch = Engine(loaded, PrefixStore(2**24))
    chats = Chat(loaded)
    asked: list[tuple[str, Any, dict[str, Any]]] = [
        ("hi", None, {"temperature": 0, "max_new_tokens": 7}),
        ("Tell me a story", [PHOTO, WIDE], {"temperature": 1.5, "seed": 3, "max_new_tokens": 3}),
        ("What is this?", PHOTO, {"temperature": 0, "repetition_penalty": 2.0, "max_new_tokens": 4}),
        ("hi", None, {"temperature": 1.5, "seed": 4, "max_new_tokens": 3}),
    ]
    states = [chats.begin(question, image, **sampling) for question, image, sampling in asked]
    for start, state in enumerate(states):
        prefill = batch.start(state)
        while batch.advance(prefill, 20) is None:
            batch.step()
        assert len(batch) == min(start + 1, 3) or len(batch) >= 1
    while len(batch):
        batch.step()
    assert states[3].num_cached > 2
    return [repr(state.new_ids) for state in states], batch


@pytest.mark.parametrize("step", ["decoding step", "forward method"])
def test_requests_join_and_leave_a_padded_batch(
    step: str, cuda: SimulatedCuda, on_cuda: LoadedModel, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if step == "forward method":
        monkeypatch.setattr(engine, "supports", lambda _: False)
    on_device, batch = answers_of_a_batch(on_cuda)
    expected, _ = answers_of_a_batch(loaded)
    assert on_device == expected
    assert batch.prefixes.num_bytes > 0
    for node in batch.prefixes._parents:
        assert {states.device for pair in node.layers for states in pair} == {CUDA}


@torch.inference_mode()
def logits_of(loaded: LoadedModel, device: torch.device, *, loss: bool = False) -> torch.Tensor:
    """Return logits, or the loss, of padded rows, the first with an image."""
    ids = torch.tensor([[5, -200, 7, 8], [5, 9, 9, 9]], device=device)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], device=device)
    image = loaded.image_processor([load_image(PHOTO)])
    outputs = loaded.model(input_ids=ids, attention_mask=mask, images=image, labels=ids.clamp(min=0) if loss else None)
    return outputs.loss if loss else outputs.logits


def spread(layers: list[Any], rest: Any) -> dict[str, Any]:
    """Return a device map with the decoder layers on the given devices."""
    names = ("vision_tower", "mm_projector", "embed_tokens", "norm", "rotary_emb")
    places = {f"model.{name}": rest for name in names} | {"lm_head": rest}
    return places | {f"model.layers.{index}": device for index, device in enumerate(layers)}


@pytest.mark.parametrize("places", ["auto", "offloaded layers", "embeddings elsewhere"])
def test_a_model_over_two_devices_and_the_host(places: str, loaded: LoadedModel) -> None:
    """accelerate moves activations between devices, and offloaded weights from the host."""
    plans = {
        "auto": "auto",
        "offloaded layers": spread([0, "cpu", 1, "cpu"], 0),
        "embeddings elsewhere": spread([1, 1, 0, 0], 0)
        | dict.fromkeys(("model.embed_tokens", "model.mm_projector", "lm_head"), 1),
    }
    with SimulatedCuda(2):
        divided = load_model(CHECKPOINT, device=plans[places])
        assert len(set(divided.model.hf_device_map.values())) > 1
        assert not engine.supports(divided.model)
        for loss in (False, True):
            result = logits_of(divided, divided.model.device, loss=loss)
            torch.testing.assert_close(result.cpu(), logits_of(loaded, HOST, loss=loss), atol=1e-4, rtol=1e-4)
        questions, images = ["What is this?", "hi"], [PHOTO, None]
        asked: dict[str, Any] = {"temperature": 1.0, "seed": 2, "repetition_penalty": 1.5, "max_new_tokens": 3}
        assert answer_batch(divided, questions, images, **asked) == answer_batch(loaded, questions, images, **asked)
        if places == "auto":
            beams: dict[str, Any] = {"temperature": 0, "num_beams": 2, "max_new_tokens": 2}
            assert Chat(divided).ask("hi", WIDE, **beams) == Chat(loaded).ask("hi", WIDE, **beams)


def test_generate_pads_on_the_left(cuda: SimulatedCuda, on_cuda: LoadedModel, loaded: LoadedModel) -> None:
    torch.testing.assert_close(logits_of(on_cuda, CUDA).cpu(), logits_of(loaded, HOST), atol=1e-4, rtol=1e-4)
    image, generated = loaded.image_processor([load_image(WIDE)]), {}
    for device, model in ((CUDA, on_cuda.model), (HOST, loaded.model)):
        ids = torch.tensor([[5, -200, 7, 8], [5, 9, 9, 9]], device=device)
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], device=device)
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
        generated[device] = model.generate(ids, images=[image[0]], num_return_sequences=1, **options).tolist()
    assert generated[CUDA] == generated[HOST]


def test_another_resolution(cuda: SimulatedCuda, loaded: LoadedModel) -> None:
    model, pixels = load_model(CHECKPOINT, device="cuda").model, torch.randn(2, 3, 84, 84)
    model.resize_images(84)
    exact = load_model(CHECKPOINT, device="cpu").model
    exact.resize_images(84)
    with torch.inference_mode():
        expected = exact.encode_images(pixels)
        torch.testing.assert_close(model.encode_images(pixels).cpu(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.encode_images(list(pixels)).cpu(), expected, atol=1e-4, rtol=1e-4)


def test_internvl_chat(cuda: SimulatedCuda) -> None:
    """Training with stochastic depth, and generation, with an image of another size."""
    pixels, found = torch.randn(1, 3, 112, 112), []
    for device in (HOST, CUDA):
        model = internvl_model().to(device)
        model.resize_images(112)
        ids = torch.tensor([[6, *[model.img_context_token_id] * 16, 7, 9]], device=device)
        for layer in model.get_vision_tower().vit.layers:
            layer.drop_path.rate = 0.5
        model.train().gradient_checkpointing_enable()
        torch.manual_seed(0)
        loss = model(ids, torch.ones_like(ids), labels=ids, pixel_values=pixels, image_flags=torch.ones(1, 1)).loss
        loss.backward()
        found.append({name: value.grad.cpu() for name, value in model.named_parameters()} | {"": loss.detach().cpu()})
        slot = torch.tensor([[6, -200, 7]], device=device)
        new_ids = model.eval().generate(slot, images=pixels, do_sample=False, max_new_tokens=3)
        found[-1]["generated"] = new_ids.cpu()
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-3)


def test_a_decoding_step_copies_tokens_to_the_device_and_the_choice_back(
    cuda: SimulatedCuda, on_cuda: LoadedModel
) -> None:
    batch = Engine(on_cuda)
    for question in ("hi", "Tell me a story"):
        batch.add(Chat(on_cuda).begin(question, temperature=0, max_new_tokens=9))
    batch.step()  # the first step of a batch copies the lengths of its rows, too
    cuda.transfers.clear()
    batch.step()
    assert len(batch) == 2
    assert cuda.transfers == {("cpu", "cuda"): 1, ("cuda", "cpu"): 1}  # of two requests


def test_requests_of_the_scheduler(
    cuda: SimulatedCuda, on_cuda: LoadedModel, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Scheduler._run

    def simulate(scheduler: Scheduler) -> None:
        with SimulatedCuda(2):
            run(scheduler)

    answered = {}
    for model in (on_cuda, loaded):
        monkeypatch.setattr(Scheduler, "_run", simulate if model is on_cuda else run)
        scheduler = Scheduler(model, Limits())
        image = SentImage(model.image_processor([load_image(WIDE)])[0], b"wide")
        events: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in range(3)]
        scheduler.submit([_request(model, image, heard) for heard in events])
        answered[model is on_cuda] = [_end(heard) for heard in events]
        scheduler.close()
    assert answered[True] == answered[False]


def _request(loaded: LoadedModel, image: SentImage, events: "queue.SimpleQueue[Event]") -> Request:
    return Request([image], lambda encoded: Chat(loaded).begin("And now?", encoded, **SHORT), events.put)


def _end(events: "queue.SimpleQueue[Event]") -> list[int]:
    while isinstance(event := events.get(timeout=60), str):
        pass
    assert not isinstance(event, Exception), event
    return event.new_ids


def test_evaluation_of_questions(
    cuda: SimulatedCuda, on_cuda: LoadedModel, loaded: LoadedModel, tmp_path: Path
) -> None:
    questions = [
        Question("0", "What is this?", lambda: load_image(PHOTO), "photo"),
        Question("1", "What is this?", None, "", is_blank=True),
    ]
    answers = [
        answer_questions(lambda m=m: m, questions, tmp_path / name, {}, batch_size=2, max_new_tokens=3)
        for name, m in (("cuda", on_cuda), ("host", loaded))
    ]
    assert answers[0] == answers[1]


@pytest.fixture
def _fresh_accelerator() -> Iterator[None]:
    """Let no test find the device of another one in accelerate."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_accelerator")
def test_training_of_packed_samples_and_evaluation(tmp_path: Path) -> None:
    """The second step starts from what the optimizer of the first one wrote; its batch holds samples without image."""
    image = conversation("photo_rgb.jpg", "What is this?", "A photo.")
    rows = write_rows(tmp_path / "rows.json", [image, conversation(None, "Say one.", "one")])
    changes: dict[str, Any] = {"max_steps": 2, "warmup_ratio": 0, "bf16": False, "packing": True}
    changes |= {"unfreeze_mm_vision_tower": True, "gradient_checkpointing": True, "image_folder": IMAGES}
    changes |= {"eval_data_path": rows, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 9}
    logs = {}
    for name in ("host", "cuda"):
        with SimulatedCuda() if name == "cuda" else nullcontext() as simulation:
            logs[name] = train(tmp_path / name, rows, **changes)
            assert simulation is None or simulation.transfers["cpu", "cuda"] > 100
    assert len(losses(logs["host"])) == 2
    assert losses(logs["cuda"]) == pytest.approx(losses(logs["host"]), rel=1e-4)
    measured = [[line["eval_loss"] for line in log if "eval_loss" in line] for log in logs.values()]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)


def samples_of(processor: ImageProcessor) -> list[Sample]:
    """Return a sample with an image and a shorter one without."""
    pixels, ids = processor.resize([load_image(PHOTO)]), [torch.tensor([5, -200, 7, 8, 9]), torch.tensor([5, 6, 7])]
    return [Sample(ids[0], ids[0].clamp(min=0), pixels, 5), Sample(ids[1], ids[1], pixels[:0], 3)]


def adapted(device: torch.device) -> tuple[PeftModel, ImageProcessor, dict[str, torch.Tensor]]:
    """Return a model with an adapter after a step of training on padded samples, and the gradients of the step."""
    loaded = load_model(CHECKPOINT, device=str(device))
    processor, tokenizer = loaded.image_processor, loaded.tokenizer
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=r"model\.layers\.\d+\..*_proj", init_lora_weights=False)
    model = get_peft_model(loaded.model, config)
    for parameter in model.get_base_model().model.mm_projector.parameters():
        parameter.requires_grad_()
    model.get_base_model().gradient_checkpointing_enable()
    batch = Collator(tokenizer.pad_token_id)(samples_of(processor))
    batch = normalize_images({name: value.to(device) for name, value in batch.items()}, processor)
    model.train()
    loss = model(**batch, skip_logits=True).loss
    loss.backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gradients = {name: value.grad.cpu() for name, value in trained.items()}
    torch.optim.AdamW(trained.values(), lr=1e-2).step()
    return model, processor, gradients | {"loss": loss.detach().cpu()}


def test_training_of_an_adapter(cuda: SimulatedCuda) -> None:
    _, _, expected = adapted(HOST)
    _, _, gradients = adapted(CUDA)
    torch.testing.assert_close(gradients, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_the_merge_of_an_adapter(cuda: SimulatedCuda, tmp_path: Path) -> None:
    model, processor, _ = adapted(CUDA)
    folder = tmp_path / "adapter"
    save_adapter(model, folder, image_processor=processor)
    for merge in (True, False):
        loaded = load_model(folder, model_base=CHECKPOINT, device=str(CUDA), merge_adapter=merge)
        model.eval()
        expected = logits_of(dataclasses.replace(loaded, model=model), CUDA)
        torch.testing.assert_close(logits_of(loaded, CUDA).cpu(), expected.cpu(), atol=1e-3, rtol=1e-3)


def test_packed_samples(cuda: SimulatedCuda, loaded: LoadedModel) -> None:
    losses = {}
    for device in (HOST, CUDA):
        model = copy.deepcopy(loaded.model).to(device).train()
        model.set_attn_implementation(register_packed_sdpa())
        batch = Collator(0, packing=True)(samples_of(loaded.image_processor))
        batch = normalize_images({name: value.to(device) for name, value in batch.items()}, loaded.image_processor)
        loss = model(**batch, skip_logits=True).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses[device] = [float(loss), float(norm)]
    assert losses[CUDA] == pytest.approx(losses[HOST], rel=1e-4)
