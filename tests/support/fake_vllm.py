"""A server with the HTTP API of vLLM, whose replies tests can change."""

import base64
import io
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from PIL import Image

from support import tiny

OK = {"message": "done"}


class FakeVLLM:
    """Replies as vLLM 0.32 does. It samples from its own model, whose weights are updated through a folder.

    ``change[path](reply, number)`` may change the reply to the number-th request of a path, raise ``Status`` or sleep.
    """

    def __init__(self, seed: int = 0):
        self.model, self.processor = tiny.vlm(seed, tied=False), tiny.processor()
        self.tokenizer, self.version, self.change, self.bodies = self.processor.tokenizer, "default", {}, []
        self.counts, self.concurrent, self.max_concurrent = Counter(), 0, 0
        self.lock = threading.Lock()
        self.rng = torch.Generator()  # a late reply must not use the random state of the next test
        self.config = {"dtype": "torch.float32", "logprobs_mode": "raw_logprobs", "max_model_len": 256, "max_logprobs": 20}
        self.lora = None
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
        return {"vllm_config": config}

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
        self.model = type(self.model).from_pretrained(body["kwargs"]["weights_path"])
        return {"results": [None]}

    @torch.no_grad()
    def generate(self, body):
        with self.lock:
            self.bodies.append(body)
            images = [part["url"].partition(",")[2] for part in body.get("content_parts") or ()]
            images = [Image.open(io.BytesIO(base64.b64decode(image))) for image in images]
            text, params = self.tokenizer.decode(body["token_ids"]), body["sampling_params"]
            inputs = self.processor(text=[text], **({"images": [images]} if images else {}), return_tensors="pt")
            logits = self.model(**inputs).logits[0].float()
            ids, logps = inputs["input_ids"][0], logits.log_softmax(-1)
            prompt = [None, *({str(t): {"logprob": logps[i, t].item()}} for i, t in enumerate(ids[1:].tolist()))]
            banned = torch.tensor([*map(int, params["logit_bias"])])
            choices, allowed = [], logps[-1].exp().index_fill(0, banned, 0.0)
            for index in range(params["n"]):
                token = int(allowed.multinomial(1, generator=self.rng))
                entry = {"token_id": token, "logprob": logps[-1, token].item()}
                choices.append(
                    {
                        "index": index,
                        "finish_reason": "stop" if index % 2 else "length",
                        "token_ids": [token],
                        "logprobs": {"content": [{**entry, "top_logprobs": [entry]}]} if "logprobs" in params else None,
                        "weight_versions": [{"version": self.version, "start": 0, "end": 1}],
                    }
                )
            prompt = prompt if "prompt_logprobs" in params else None
            return {"choices": choices, "prompt_token_ids": ids.tolist(), "prompt_logprobs": prompt}


class Status(Exception):
    """Raised to reply with an error: its status and message."""
