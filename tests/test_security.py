"""Attacks through files, answers and servers that a run reads: none can run code, exhaust memory or obtain a secret.

docs/security.md lists the files that are read, and what must be trusted.
"""

import base64
import io
import json
import os
import pickle
import shutil
import struct
import threading
import zlib
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import tiny

from vlmkernels.cli import main
from vlmkernels.data.dataset import check_dataset, load_dataset
from vlmkernels.data.images import ImageLimits, open_image
from vlmkernels.data.samples import encode, read_sample, read_video
from vlmkernels.evaluate import page as evaluate_page
from vlmkernels.evaluate.evaluation import Comparison, Evaluation, EvaluationRows, Scoring, reward_parts
from vlmkernels.evaluate.predictions import Completion, Predictions
from vlmkernels.models.families import family_of
from vlmkernels.models.loading import load_model, load_processor
from vlmkernels.record.completions import CompletionRow, save_step
from vlmkernels.report.curves import Point
from vlmkernels.report.page import run_page
from vlmkernels.report.run import Run
from vlmkernels.rewards import Rewards
from vlmkernels.rewards.judge import Judge
from vlmkernels.train import GRPOConfig, GRPOTrainer
from vlmkernels.train.checkpoint import MANIFEST, last_complete_checkpoint

torch.set_num_threads(1)


# Files that would run code


class Payload:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """The folder that a payload would create. Checks that payloads work, and at the end that none has run."""
    payload = tmp_path / "it-works"
    pickle.loads(pickle.dumps(Payload(payload)))
    assert payload.exists()
    yield tmp_path / "was-run"
    assert not (tmp_path / "was-run").exists()


def run(folder, **options):
    args = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=4, max_completion_length=3,
        steps_per_generation=2, save_steps=1, logging_steps=1, report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip

    def reward(completions, **_):
        return [float(len(c[0]["content"])) for c in completions]

    return GRPOTrainer(tiny.vlm(), reward, args, tiny.rows(4), processing_class=tiny.processor())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(folder, max_steps=1).train()
    return Path(last_complete_checkpoint(folder))


PICKLED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "experience_0.pt")  # written by torch.save, read by a resumed run


def forged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint without the manifest, which would reveal a changed file."""
    return Path(shutil.copytree(checkpoint, tmp_path / "out" / "checkpoint-1", ignore=shutil.ignore_patterns(MANIFEST)))


@pytest.mark.parametrize("name", PICKLED)
def test_pickles_of_a_checkpoint_do_not_run(checkpoint, mark, tmp_path, name):
    folder = forged(checkpoint, tmp_path)
    assert (folder / name).exists()
    torch.save({"state": Payload(mark)}, folder / name)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        run(tmp_path / "out", max_steps=2).train(resume_from_checkpoint=str(folder))


def test_no_other_file_of_a_checkpoint_is_a_pickle_that_is_read(checkpoint, mark, tmp_path):
    """transformers writes training_args.bin, and no one reads it."""
    others = {file.name for file in checkpoint.iterdir() if file.suffix not in (".json", ".safetensors", ".jinja")}
    assert others == {*PICKLED, "training_args.bin"}
    folder = forged(checkpoint, tmp_path)
    torch.save(Payload(mark), folder / "training_args.bin")
    run(tmp_path / "out", max_steps=2).train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("adapter", [False, True])
def test_pickled_weights_do_not_run(mark, tmp_path, adapter):
    tiny.vlm().save_pretrained(tmp_path / "model")
    folder, name = tmp_path / "model", "pytorch_model.bin"
    if adapter:
        from peft import LoraConfig, get_peft_model

        folder, name = tmp_path / "adapter", "adapter_model.bin"
        get_peft_model(load_model(str(tmp_path / "model")), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({"weight": Payload(mark)}, folder / name)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_model(str(folder))


CODE = {
    "config.json": (load_model, {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"}),
    "processor_config.json": (load_processor, {"AutoProcessor": "evil.Evil"}),
}


@pytest.mark.parametrize("file", CODE)
def test_code_of_a_model_runs_only_if_allowed(mark, tmp_path, monkeypatch, file):
    load, classes = CODE[file]
    tiny.vlm().save_pretrained(tmp_path / "model")
    tiny.processor().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / file
    content = json.loads(path.read_text()) | {"auto_map": classes, "model_type": "evil", "processor_class": "Evil"}
    path.write_text(json.dumps(content))
    (tmp_path / "model" / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    monkeypatch.setattr("builtins.input", lambda text: "y")  # the answer if transformers asks at the terminal
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(str(tmp_path / "model"))
    assert not mark.exists()
    with pytest.raises(Exception):  # noqa: B017 (evil.py has no class Evil)
        load(str(tmp_path / "model"), {"trust_remote_code": True})
    mark.rmdir()  # this time it was allowed


def test_a_chat_template_is_confined(tmp_path):
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    from jinja2.exceptions import SecurityError

    processor = tiny.processor()
    processor.chat_template = template
    row = {"prompt": [{"role": "user", "content": "hi"}]}
    with pytest.raises(SecurityError):
        encode([read_sample(row, 0)], processor, family_of(tiny.vlm().config))


def test_yaml_makes_no_objects(mark, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(tmp_path / "run.yaml")])
    assert "must be YAML: could not determine a constructor" in capsys.readouterr().err


# Images


def png(width: int, height: int) -> bytes:
    """A small PNG file that declares, and would decode to, this many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(4096))) + chunk(b"IEND", b"")


def as_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def ask(**row):
    return {"prompt": [{"role": "user", "content": "what?"}], **row}


BOMB = png(20_000, 5_000)
DATA_URL = "data:image/png;base64," + base64.b64encode(as_bytes(tiny.image(1))).decode()


@pytest.mark.parametrize("pixels", [(20_000, 5_000), (100_000, 100_000)], ids=["above our limit", "above the limit of PIL"])
@pytest.mark.parametrize("form", ["bytes", "dict", "path", "opened", "data", "frame"])
def test_decompression_bombs(tmp_path, form, pixels):
    """An error names image and size before any pixel is decoded, for every form of an image."""
    bomb = png(*pixels)
    (tmp_path / "a.png").write_bytes(bomb)
    if form == "opened" and pixels[0] > 20_000:
        pytest.skip("PIL does not open it")
    forms = {
        "bytes": lambda: bomb,
        "dict": lambda: {"bytes": bomb, "path": None},
        "path": lambda: str(tmp_path / "a.png"),
        "opened": lambda: Image.open(tmp_path / "a.png"),
        "data": lambda: "data:image/png;base64," + base64.b64encode(bomb).decode(),
        "frame": lambda: bomb,
    }
    value = forms[form]()
    row = ask(videos=[[tiny.image(0), value]]) if form == "frame" else ask(images=[tiny.image(0), value])
    name = r"videos\[0\]\[1\]" if form == "frame" else r"images\[1\]"
    message = rf"sample 7: {name} cannot be read: image must have at most 89478485 pixels \(max_image_pixels\)"
    for decode in (True, False):
        with pytest.raises(ValueError, match=message):
            read_sample(row, 7, decode)


def test_the_limits_of_images_are_settings(tmp_path):
    image = tiny.image(0, 56, 28)
    (tmp_path / "a.png").write_bytes(as_bytes(image))
    for value in (image, as_bytes(image), str(tmp_path / "a.png"), DATA_URL):
        with pytest.raises(ValueError, match=r"at most 783 pixels \(max_image_pixels\), got (56|28) x 28"):
            open_image(value, ImageLimits(max_pixels=783))
    for value in (as_bytes(image), str(tmp_path / "a.png"), DATA_URL):
        with pytest.raises(ValueError, match=r"at most 70 bytes \(max_image_bytes\), got \d+ bytes"):
            open_image(value, ImageLimits(max_bytes=70))
    with pytest.raises(ValueError, match=r"sample 0: image cannot be read: .*max_image_pixels"):
        GRPOTrainer(
            tiny.vlm(), "exact_match", GRPOConfig(output_dir=str(tmp_path), max_image_pixels=783, report_to="none"),
            tiny.rows(8), processing_class=tiny.processor(),
        )  # fmt: skip
    with pytest.raises(ValueError, match="max_image_bytes must be >= 1, got 0"):
        GRPOConfig(output_dir=str(tmp_path), max_image_bytes=0)
    with pytest.raises(ValueError, match="max_image_pixels must be at most 178956970, above which PIL raises"):
        ImageLimits(max_pixels=10**9)


def test_one_frame_of_an_animated_file_is_decoded(monkeypatch):
    frames = [Image.effect_noise((56, 56), 80) for _ in range(4)]
    data = as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    opened = open_image(data)
    assert opened.n_frames == 4
    seeks = []
    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.seek", lambda self, frame: seeks.append(frame))
    (image,) = read_sample(ask(image=data), 0).images
    assert image.size == (56, 56)
    assert not seeks


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_files_cut_anywhere_are_named(kind):
    data = as_bytes(Image.effect_noise((64, 64), 80).convert("RGB"), kind)
    for length in range(0, len(data) - 2, max(1, len(data) // 40)):
        try:
            assert read_sample(ask(image=data[:length]), 5).images[0].size == (64, 64)  # the rest was enough
        except ValueError as error:
            assert str(error).startswith("sample 5: image cannot be read: ")  # noqa: PT017


def test_only_pixel_formats_are_opened(tmp_path, mark):
    """EPS files are programs, which PIL passes to Ghostscript."""
    eps = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%mkdir {mark}) (w) file\n%%EOF\n".encode()
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(ValueError, match=r"sample 0: image cannot be read: cannot identify image file .*; formats: PNG, "):
        read_sample(ask(image=eps), 0)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait forever
    with pytest.raises(ValueError, match=r"image must be a regular file, got .*pipe"):
        open_image(tmp_path / "pipe")


def test_data_urls():
    assert open_image(DATA_URL).convert("RGB").tobytes() == tiny.image(1).tobytes()
    for url in ("data:image/png,abc", "data:image/png;base64"):
        with pytest.raises(ValueError, match="data URL must begin with 'data:<type>;base64,'"):
            open_image(url)
    with pytest.raises(ValueError, match="data URL must be base64, got 'a b'"):
        open_image("data:image/png;base64,a b")


class Files(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append(self.path)
        self.send_response(302 if self.path in self.server.redirects else 200)
        if self.path in self.server.redirects:
            self.send_header("Location", self.server.redirects[self.path])
        self.end_headers()
        self.wfile.write(as_bytes(tiny.image(1)) if self.path == "/a.png" else bytes(2**20))

    def do_POST(self):
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.handle_error = lambda *args: None
    server.seen, server.redirects = [], {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_remote_images_are_fetched_only_if_allowed(server, tmp_path):
    url = f"{server.url}/a.png"
    (tmp_path / "data.jsonl").write_text(json.dumps(ask(image=url)))
    rows = load_dataset(tmp_path / "data.jsonl")
    message = "sample 0: image cannot be read: image must not be a remote URL unless allow_image_urls is set, got http"
    with pytest.raises(ValueError, match=message):
        check_dataset(rows, "data", tiny.processor())
    for value in ({"bytes": None, "path": url}, {"path": url}):
        with pytest.raises(ValueError, match="allow_image_urls"):
            open_image(value)
    inside = [{"role": "user", "content": [{"type": "image", "image": url}, {"type": "text", "text": "?"}]}]
    with pytest.raises(ValueError, match="allow_image_urls"):
        read_sample({"prompt": inside}, 0)
    assert not server.seen
    allowed = ImageLimits(allow_urls=True, max_bytes=2**19)
    assert read_sample(rows[0], 0, limits=allowed).images[0].tobytes() == tiny.image(1).tobytes()
    with pytest.raises(ValueError, match="big must have at most 524288 bytes"):
        open_image(f"{server.url}/big", allowed)
    secret = tmp_path / "secret.png"
    secret.write_bytes(as_bytes(tiny.image(2)))
    for scheme in ("file", "ftp", "gopher"):
        server.redirects["/away"] = f"{scheme}://{secret}"
        with pytest.raises(OSError, match="/away was not fetched"):
            open_image(f"{server.url}/away", allowed)
        with pytest.raises(ValueError, match="URL that begins with data:, http: or https:"):
            open_image(f"{scheme}://{secret}", allowed)


def test_a_video_must_be_a_list_of_frames():
    with pytest.raises(TypeError, match="videos must be a list of frames"):
        read_video("http://127.0.0.1/a.mp4", "videos")


# Pages


class Markup(HTMLParser):
    """The tags of a page, and attributes that run code."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.handlers = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.handlers += [name for name, value in attributes if name.startswith("on") or "javascript:" in (value or "")]


EVIL = "</pre></title></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'><b onclick=alert(1)>"


def test_the_page_of_completions_escapes_everything(tmp_path):
    pages = {}
    for text in ("word", EVIL):
        folder = tmp_path / str(len(pages))
        save_step(folder / "completions", 1, [[CompletionRow(text, [tiny.image(0)], text, {text: 1.0}, 0.5, {text: text})]])
        lines = [
            {"step": step, "reward": float(step), f"rewards/{text}/mean": float(step), text: float(step)} for step in (1, 2)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        one = Markup((folder / "completions" / "step-000001.html").read_text())
        pages[text] = one, Markup(run_page(Run.read(folder)))
    for harmless, evil in zip(*pages.values(), strict=True):
        assert harmless.tags == evil.tags
        assert not evil.handlers


def test_the_page_of_an_untrusted_run_has_only_images_that_the_trainer_stores(tmp_path):
    save_step(tmp_path / "completions", 1, [[CompletionRow("?", [tiny.image(0)], "!", {"cer": 1.0}, 0.5)]])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n')
    assert "data:image/png;base64," in run_page(Run.read(tmp_path))
    path = tmp_path / "completions" / "step-000001.json"
    content = json.loads(path.read_text())
    for source in ('data:image/png;base64,x" onerror="alert(1)"><script>alert(1)</script>', "https://example.com/image.png"):
        content["groups"][0]["images"][0][0] = source
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="the source of an image must be a data URI"):
            run_page(Run.read(tmp_path))


def test_the_page_of_an_evaluation_escapes_everything(tmp_path):
    found = []
    for text in ("word", EVIL):
        rows = [{"prompt": text, "answer": text, "kind": text}, {"prompt": "why", "answer": "b", "kind": text}]
        path = tmp_path / "run.jsonl"
        path.unlink(missing_ok=True)
        predictions = Predictions(path).resume({"seed": 0})
        predictions.append("image", {i: [Completion(text, [1], 1, False)] for i in range(2)})
        scoring = Scoring(by="kind")
        parsed = EvaluationRows(rows, scoring)
        rewards = Rewards(["exact_match"])
        parts = {"image": reward_parts(rewards, parsed, [predictions], "image")}
        evaluation = Evaluation([predictions], parsed, scoring, parts)
        points = [Point(step, float(step), 0.0, 1.0) for step in range(3)]
        evaluate_page.write_page(
            tmp_path / "page.html",
            text,
            text,
            evaluation,
            comparisons=[Comparison(text, evaluation, text, evaluation)],
            curves={text: points},
        )
        found.append(Markup((tmp_path / "page.html").read_text()))
    assert found[0].tags == found[1].tags
    assert not found[1].handlers


# Servers


def test_a_redirect_of_a_judge_gets_neither_prompt_nor_key(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.redirects["/v1/chat/completions"] = f"{server.url}/elsewhere"
    judge = Judge(url=f"{server.url}/v1", model="m", api_key_env="JUDGE_KEY", retries=3, backoff=0.0)
    with pytest.raises(RuntimeError, match=r"reward judge.*sample 3.* failed with 302 Found"):
        Rewards([judge])(1, [3], prompts=["p"], completions=["c"])
    assert server.seen == [("/v1/chat/completions", "Bearer secret"), "/v1/chat/completions"]


def test_a_key_is_not_sent_unencrypted(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with pytest.raises(ValueError, match=r"url must begin with https:// to send the key .*OPENAI_API_KEY .*'http://judge:8000"):
        Judge(url="http://judge:8000/v1", model="m")
    Judge(url="http://judge:8000/v1", model="m", api_key_env="")
    Judge(url="https://judge/v1", model="m")
    monkeypatch.delenv("OPENAI_API_KEY")
    Judge(url="http://judge:8000/v1", model="m")


def test_the_reply_of_a_judge_is_bounded(server, monkeypatch):
    monkeypatch.setattr("vlmkernels.rewards.judge._MAX_REPLY", 1000)
    judge = Judge(url=f"{server.url}/v1", model="m", retries=0)
    with pytest.raises(RuntimeError, match=r"the reply of .* must have at most 1000 bytes"):
        Rewards([judge])(1, [0], prompts=["p"], completions=["c"])


def test_nothing_listens_beyond_this_machine():
    """No module opens a port or names an address that other machines can reach."""
    root = Path(__file__).parents[1] / "vlmkernels"
    for path in root.rglob("*.py"):
        text = path.read_text()
        assert not any(word in text for word in ("0.0.0.0", "socketserver", "http.server", ".listen(")), path
