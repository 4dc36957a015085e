"""A server with the HTTP API of vLLM, and a module like vLLM, whose replies tests can change."""

import base64
import io
import json
import pickle
import threading
import types
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from PIL import Image
from torch.multiprocessing.reductions import rebuild_tensor

from support import tiny

OK = {"message": "done"}


class FakeVLLM:
    """Replies as vLLM 0.32 does. It samples from its own model, whose weights are updated through a folder or in memory.

    With ``num_experts``, (L, K), it also returns experts, see ``experts_of``. ``script`` sets the answers to prompts. With
    ``is_greedy`` it samples greedily at any temperature. ``change[path](reply, number)`` may change the reply to the number-th
    request of a path, raise ``Status`` or sleep.
    """

    def __init__(self, seed: int = 0, model=None, processor=None):
        self.model = tiny.vlm(seed, tied=False) if model is None else model
        self.processor = tiny.processor() if processor is None else processor
        self.tokenizer, self.version, self.change, self.bodies = self.processor.tokenizer, "default", {}, []
        self.counts, self.concurrent, self.max_concurrent = Counter(), 0, 0
        self.lock = threading.Lock()
        self.rng = torch.Generator()  # a late reply must not use the random state of the next test
        self.config = {"dtype": "torch.float32", "logprobs_mode": "raw_logprobs", "max_model_len": 256, "max_logprobs": 20}
        self.config |= {"return_sampling_mask": False, "multimodal_config": {"media_io_kwargs": {}}}
        self.lora, self.scripts, self.is_greedy, self.num_experts = None, {}, False, None
        self.transfer, self.received, self.handles = None, None, []
        self.paths = ["/collective_rpc", "/update_weight_version", "/inference/v1/generate", "/v1/load_lora_adapter"]
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.reply(None)

            def do_POST(self):
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, body):
                status, content = fake.reply_to(self.path.partition("?")[0], body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                """Ignore clients that closed the connection, as those of some tests do."""

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def reply_to(self, path: str, body) -> tuple[int, bytes]:
        with self.lock:
            self.counts[path] += 1
            number = self.counts[path]
            self.concurrent += 1
            self.max_concurrent = max(self.max_concurrent, self.concurrent)
        try:
            reply = getattr(self, path.rpartition("/")[2].replace(".", "_"), lambda body: OK)(body)
            if path in self.change:
                reply = self.change[path](reply, number)
            return 200, reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        except Status as error:
            return error.args[0], json.dumps({"error": {"message": error.args[1]}}).encode()
        finally:
            with self.lock:
                self.concurrent -= 1

    def openapi_json(self, body):
        return {"paths": {path: {} for path in self.paths}}

    def server_info(self, body):
        scheduler, load = {"max_num_seqs": 16}, {"load_format": "auto"}
        config = {"model_config": self.config, "lora_config": self.lora, "scheduler_config": scheduler, "load_config": load}
        experts = {"enable_return_routed_experts": self.num_experts is not None}
        transfer = self.transfer and {"backend": self.transfer}
        return {"vllm_config": {**config, "weight_transfer_config": transfer, "aux_output_config": experts}}

    def models(self, body):
        return {"data": [{"id": "tiny"}]}

    def weight_info(self, body):
        return {"weight_version": self.version}

    def update_weight_version(self, body):
        self.version = body["new_version"]
        return OK

    def reset_prefix_cache(self, body):
        return {"success": True}

    def collective_rpc(self, body):
        assert body["method"] == "reload_weights"
        if "weights_path" in body["kwargs"]:
            self.model = type(self.model).from_pretrained(body["kwargs"]["weights_path"])
        else:
            self.load(body["kwargs"]["weights_iterator"])
        return {"results": [None]}

    def load(self, tensors):
        """Load the tensors of a checkpoint."""
        state = {name: x.clone() for name, x in tensors}
        self.model = type(self.model).from_pretrained(None, config=self.model.config, state_dict=state).eval()

    # Weights in memory, as tensors of the CPU: their handles hold copies of them.

    def get_world_size(self, body):
        return {"world_size": 1}

    def start_weight_update(self, body):
        if self.received is not None:
            raise Status(500, "a weight update is active")
        self.received = {}
        return OK

    def update_weights(self, body):
        info = body["update_info"]
        self.handles = pickle.loads(base64.b64decode(info["ipc_handles_pickled"]))
        rebuilt = [rebuild_tensor(*handle["GPU-0"]) for handle in self.handles]
        for name, x, dtype, shape in zip(info["names"], rebuilt, info["dtype_names"], info["shapes"], strict=True):
            assert (str(x.dtype), list(x.shape)) == (f"torch.{dtype}", shape)
            self.received[name] = x
        return OK

    def finish_weight_update(self, body):
        self.load(self.received.items())
        self.received = None
        return OK

    def script(self, token_ids: list[int], images: list[Image.Image], completions: list[list[int]]) -> None:
        """Answer a prompt with ``completions``. A prompt without a script gets an error as soon as there is one."""
        self.scripts[tuple(token_ids)] = images, completions

    def generate(self, body):
        media = {"image_url": [], "video_url": []}
        for part in body.get("content_parts") or ():
            frames = [Image.open(io.BytesIO(base64.b64decode(data))) for data in part["url"].split(",")[1:]]
            media[part["type"]].append(frames)
        options = {"num_frames": 32, "fps": 1.0, **self.config["multimodal_config"]["media_io_kwargs"].get("video", {})}
        cut = options["num_frames"] if options["num_frames"] >= 0 else None
        videos = [(np.stack([np.asarray(frame) for frame in frames[:cut]]), options["fps"]) for frames in media["video_url"]]
        with self.lock:
            self.bodies.append(body)
            images = [image for [image] in media["image_url"]]
            return self.complete(body["token_ids"], images, body["sampling_params"], videos)

    @torch.no_grad()
    def complete(self, token_ids: list[int], images: list[Image.Image], params: dict, videos=()) -> dict:
        """Return the reply to a prompt, as JSON.

        Sampled completions are one token, and every second one has ended. Those of a script, and greedy ones, end as in vLLM.
        ``videos`` are pairs of frames (T, H, W, 3) and frames per second.
        """
        if self.config["return_sampling_mask"] and (params["temperature"] <= 0 or params.get("top_k", 0) <= 0):
            raise Status(400, "sampling distribution replay requires temperature > 0 and top_k > 0")
        inputs = self._encode(token_ids, images, videos)
        ids = inputs["input_ids"][0].tolist()
        logps = self.model(**inputs).logits[0].float().log_softmax(-1)
        prompt = [None, *({str(t): {"logprob": logps[i, t].item()}} for i, t in enumerate(ids[1:]))]
        banned = torch.tensor([*map(int, params["logit_bias"])])
        is_greedy = self.is_greedy or params["temperature"] == 0
        is_sampled = not (self.scripts or is_greedy) or "prompt_logprobs" in params
        if is_sampled:
            processed = self._processed(inputs, params)
            allowed = processed.exp().index_fill(0, banned, 0.0)
            completions = [[int(allowed.multinomial(1, generator=self.rng))] for _ in range(params["n"])]
        elif self.scripts:
            completions = self._scripted(token_ids, images, params)
        else:
            completions = [self._greedy(inputs, banned, params)] * params["n"]
        choices = []
        for index, tokens in enumerate(completions):
            ended = index % 2 if is_sampled else tokens[-1] in params["stop_token_ids"]
            entries = [{"token_id": t, "logprob": p} for t, p in zip(tokens, self._logps(inputs, tokens), strict=True)]
            if is_sampled and self.config["logprobs_mode"] == "processed_logprobs":
                entries = [{"token_id": tokens[0], "logprob": processed[tokens[0]].item()}]
            content = [{**entry, "top_logprobs": [entry]} for entry in entries]
            choices.append(
                {
                    "index": index,
                    "finish_reason": "stop" if ended else "length",
                    "token_ids": tokens,
                    "logprobs": {"content": content} if "logprobs" in params else None,
                    "weight_versions": [{"version": self.version, "start": 0, "end": len(tokens)}],
                }
            )
            if self.config["return_sampling_mask"]:
                choices[-1]["sampling_mask"] = [processed.isfinite().nonzero()[:, 0].tolist()] * len(tokens)
            if self.num_experts is not None:
                buffer = io.BytesIO()
                np.save(buffer, experts_of([*ids, *tokens][:-1], self.num_experts))
                choices[-1]["routed_experts"] = base64.b64encode(buffer.getvalue()).decode()
        prompt = prompt if "prompt_logprobs" in params else None
        return {"choices": choices, "prompt_token_ids": ids, "prompt_logprobs": prompt}

    def _scripted(self, token_ids: list[int], images: list[Image.Image], params: dict) -> list[list[int]]:
        if tuple(token_ids) not in self.scripts:
            raise Status(400, f"no script for {self.tokenizer.decode(token_ids)!r}")
        expected, completions = self.scripts[tuple(token_ids)]
        if [(x.mode, x.size, x.tobytes()) for x in images] != [(x.mode, x.size, x.tobytes()) for x in expected]:
            raise Status(400, f"other images than scripted for {self.tokenizer.decode(token_ids)!r}")
        if len(completions) != params["n"]:
            raise Status(400, f"n must be {len(completions)}, got {params['n']}")
        return [tokens[: params["max_tokens"]] for tokens in completions]

    def _processed(self, inputs: dict[str, torch.Tensor], params: dict) -> torch.Tensor:
        """Return the log-probabilities with which the next token is sampled, (V,)."""
        logits = self.model(**inputs).logits[0, -1].float()
        for token, bias in params["logit_bias"].items():
            logits[int(token)] += bias
        logits /= params["temperature"] or 1
        if params.get("top_k", 0) > 0:
            logits[logits < logits.topk(params["top_k"]).values[-1]] = -torch.inf
        return logits.log_softmax(-1)

    def _encode(self, token_ids: list[int], images: list[Image.Image], videos=()) -> dict[str, torch.Tensor]:
        """Return the model inputs of a prompt with one placeholder per image and video."""
        processor, media, ids, sizes = self.processor, {}, [], {}
        if images:
            media |= dict(processor.image_processor(images=images, return_tensors="pt"))
            sizes[processor.image_token_id] = media["image_grid_thw"].prod(-1) // processor.image_processor.merge_size**2
        if videos:
            processed = processor.video_processor(
                videos=[frames for frames, _ in videos],
                video_metadata=[
                    {"total_num_frames": len(x), "fps": fps, "frames_indices": [*range(len(x))]} for x, fps in videos
                ],
                do_sample_frames=False,
                return_tensors="pt",
            )
            media |= {name: processed[name] for name in ("pixel_values_videos", "video_grid_thw")}
            seconds = [processor.video_processor.temporal_patch_size / fps for _, fps in videos]
            media["second_per_grid_ts"] = torch.tensor(seconds)
            sizes[processor.video_token_id] = media["video_grid_thw"].prod(-1) // processor.video_processor.merge_size**2
        sizes = {token: iter(counts.tolist()) for token, counts in sizes.items()}
        for token in token_ids:
            ids += [token] * (next(sizes[token]) if token in sizes else 1)
        assert all(next(counts, None) is None for counts in sizes.values()), "more images or videos than placeholders"
        ids = torch.tensor([ids])
        types = (ids == processor.image_token_id).int() + 2 * (ids == processor.video_token_id).int()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **media}

    def _extended(self, inputs: dict[str, torch.Tensor], tokens: list[int]) -> dict[str, torch.Tensor]:
        more = torch.tensor([tokens], dtype=torch.int64)
        added = {"input_ids": more, "attention_mask": torch.ones_like(more), "mm_token_type_ids": torch.zeros_like(more)}
        return {name: torch.cat([x, added[name]], 1) if name in added else x for name, x in inputs.items()}

    def _logps(self, inputs: dict[str, torch.Tensor], tokens: list[int]) -> list[float]:
        """Return the log-probabilities of the tokens after the prompt."""
        logps = self.model(**self._extended(inputs, tokens)).logits[0, -len(tokens) - 1 : -1].float().log_softmax(-1)
        return logps.gather(1, torch.tensor(tokens).unsqueeze(1))[:, 0].tolist()

    def _greedy(self, inputs: dict[str, torch.Tensor], banned: torch.Tensor, params: dict) -> list[int]:
        tokens = []
        while len(tokens) < params["max_tokens"] and not {*tokens} & {*params["stop_token_ids"]}:
            logits = self.model(**self._extended(inputs, tokens)).logits[0, -1]
            tokens.append(int(logits.index_fill(0, banned, -torch.inf).argmax()))
        return tokens


class FakeModule(types.ModuleType):
    """A module like ``vllm``, whose ``LLM`` replies as a ``FakeVLLM`` does.

    Attributes:
        aborted: the ids of requests that were aborted.
    """

    def __init__(self, fake: FakeVLLM):
        super().__init__("vllm")
        self.SamplingParams, self.fake, self.aborted, self.waiting = dict, fake, [], {}
        self.llm_engine = types.SimpleNamespace(step=self.step, abort_request=self.abort_request)
        self.llm_engine.engine_core = types.SimpleNamespace(shutdown=lambda: None)
        self.llm_engine.reset_encoder_cache = lambda: None
        self.model_config = types.SimpleNamespace(max_model_len=fake.config["max_model_len"])

    def LLM(self, folder, logprobs_mode, **options):
        self.fake.config["logprobs_mode"], self.options = logprobs_mode, options
        return self

    def collective_rpc(self, method, kwargs):
        self.fake.collective_rpc({"method": method, "kwargs": kwargs})

    def reset_prefix_cache(self):
        return True

    def update_weight_version(self, version):
        self.fake.version = version

    def enqueue(self, prompts, params, lora_request, use_tqdm):
        [prompt] = prompts
        number = self.fake.counts["enqueue"]
        self.fake.counts["enqueue"] += 1
        media = prompt.get("multi_modal_data", {})
        videos = [(frames, metadata["fps"]) for frames, metadata in media.get("video", [])]
        reply = self.fake.complete(prompt["prompt_token_ids"], media.get("image", []), params, videos)
        self.waiting[str(number)] = reply
        return [f"{number}-0f0f0f0f"]

    def step(self):
        """Finish the request that was sent last, so that replies arrive in another order than requests."""
        if "step" in self.fake.change:
            self.fake.change["step"](None, len(self.waiting))
        if not self.waiting:
            raise RuntimeError("step was called without requests")
        number, reply = self.waiting.popitem()
        return [types.SimpleNamespace(finished=False), _request_output(number, reply)]

    def abort_request(self, ids, internal):
        assert internal
        self.aborted += ids
        self.waiting.clear()


def _request_output(number: str, reply: dict) -> types.SimpleNamespace:
    """Convert a reply to a ``vllm.RequestOutput``."""

    def logps(entries):
        return {int(token): types.SimpleNamespace(logprob=entry["logprob"]) for token, entry in entries.items()}

    def output(choice):
        content = choice["logprobs"] and choice["logprobs"]["content"]
        versions = [types.SimpleNamespace(**span) for span in choice["weight_versions"]]
        lists = content and [logps({entry["token_id"]: entry}) for entry in content]
        experts = choice.get("routed_experts")
        experts = experts and np.load(io.BytesIO(base64.b64decode(experts)))
        return types.SimpleNamespace(**choice | {"logprobs": lists, "weight_versions": versions, "routed_experts": experts})

    prompt = reply["prompt_logprobs"] and [entries and logps(entries) for entries in reply["prompt_logprobs"]]
    return types.SimpleNamespace(
        request_id=number,
        finished=True,
        outputs=[output(choice) for choice in reply["choices"]],
        prompt_token_ids=reply["prompt_token_ids"],
        prompt_logprobs=prompt,
    )


def experts_of(token_ids: list[int], shape: tuple[int, int]) -> np.ndarray:
    """Return the experts (T, L, K) of tokens; those of a token depend on its id, its position, the layer and the slot."""
    layers, slots = shape
    tokens, position = np.array(token_ids), np.arange(len(token_ids))
    values = 7 * tokens[:, None, None] + 3 * position[:, None, None] + 5 * np.arange(layers)[:, None] + np.arange(slots)
    return (values % 100).astype(np.uint8)


class Status(Exception):
    """Raised to reply with an error: its status and message."""
