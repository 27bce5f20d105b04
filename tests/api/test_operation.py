"""What an operator sets and sees: keys, origins, TLS, limits, deadlines, names, the log, and the metrics."""

import json
import logging
import re
import shutil
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from qserve.api.app import make_app
from qserve.api.keys import read_keys
from qserve.api.service import Service
from qserve.config import AccessConfig, LimitsConfig, ServerConfig
from qserve.errors import UsageError
from qserve.logs import JsonLines, TextLines
from qserve.server import Server as HttpServer
from qserve.server import listen
from tests.api.conftest import Server, make_llm, serving, wait_until

ORIGIN = "https://page.example"


def complete(server: Server, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + "/v1/completions", json={"prompt": "x", **fields}, timeout=30)


class TestKeys:
    def test_flags_and_file_together(self, tmp_path: Path) -> None:
        path = tmp_path / "keys"
        path.write_text("# of the web page\none\n\n  two  \n")
        assert read_keys(AccessConfig(api_key=("zero",), api_key_file=str(path))) == ["zero", "one", "two"]

    @pytest.mark.parametrize(("content", "message"), [("# none yet\n", "holds no key"), (None, "cannot be read")])
    def test_a_file_without_keys_does_not_open_the_server(
        self, tmp_path: Path, content: str | None, message: str
    ) -> None:
        path = tmp_path / "keys"
        if content is not None:
            path.write_text(content)
        with pytest.raises(UsageError, match=message):
            make_app(Service(), access=AccessConfig(api_key_file=str(path))).build_middleware_stack()

    @pytest.mark.parametrize("key", ["", " a", "a\n"])
    def test_a_key_that_no_client_could_send_is_refused(self, key: str) -> None:
        with pytest.raises(UsageError, match="API key"):
            read_keys(AccessConfig(api_key=(key,)))

    def test_keys_need_not_be_ascii_and_metrics_may_be_open(self, tokenizer_directory: Path) -> None:
        access = AccessConfig(api_key=("schlüssel",), open_metrics=True)
        with serving(tokenizer_directory, access=access) as server:
            assert httpx.get(server.url + "/metrics").status_code == 200
            assert httpx.get(server.url + "/v1/models").status_code == 401
            headers = {"Authorization": "Bearer schlüssel".encode()}
            assert httpx.get(server.url + "/v1/models", headers=headers).status_code == 200


class TestOrigins:
    def test_closed_by_default(self, client: httpx.Client) -> None:
        response = client.get("/v1/models", headers={"Origin": ORIGIN})
        assert not [name for name in response.headers if name.startswith("access-control")]

    def test_a_named_origin_may_ask_once_it_has_a_key(self, tokenizer_directory: Path) -> None:
        access = AccessConfig(api_key=("key",), allow_origin=(ORIGIN,))
        with serving(tokenizer_directory, access=access) as server:
            preflight = {
                "Origin": ORIGIN,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type",
            }
            url = server.url + "/v1/completions"
            assert httpx.options(url, headers=preflight).headers["access-control-allow-origin"] == ORIGIN
            assert httpx.options(url, headers={**preflight, "Origin": "https://other.example"}).status_code == 400
            refused = httpx.post(url, headers={"Origin": ORIGIN}, json={"prompt": "x"})
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == ORIGIN  # so that the page can read the error


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls(tokenizer_directory: Path, tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key, "-out", certificate]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-days", "2"]
    subprocess.run(["openssl", "req", "-x509", *made, *names], check=True, capture_output=True)
    llm, _ = make_llm(tokenizer_directory)
    service, config = Service(llm), ServerConfig(port=0, ssl_certfile=certificate, ssl_keyfile=key)
    server = HttpServer(make_app(service), service, config)
    with listen(config) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        url = f"https://127.0.0.1:{listening.getsockname()[1]}"
        trusted = ssl.create_default_context(cafile=certificate)
        assert httpx.get(url + "/v1/models", verify=trusted).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http") + "/v1/models")
        server.stop()
        thread.join()


@pytest.mark.parametrize("files", [{"ssl_certfile": "/nowhere.pem"}, {"ssl_keyfile": "/nowhere.pem"}])
def test_tls_files_that_cannot_be_used(files: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="TLS"):
        HttpServer(make_app(Service()), Service(), ServerConfig(port=0, **files))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 3}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ["x"] * 3}, "prompt"),
        ({"stop": ["a", "b", "c"]}, "stop"),
        ({"logprobs": 3}, "logprobs"),
        ({"prompt_logprobs": 3}, "prompt_logprobs"),
    ],
)
def test_limits_of_a_request(limited: Server, fields: dict[str, Any], param: str) -> None:
    response = complete(limited, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert "at most 2" in error["message"]
    reduced = {name: value[:2] if isinstance(value, list) else 2 for name, value in fields.items()}
    assert complete(limited, **reduced).status_code == 200


@pytest.fixture(scope="module")
def limited(tokenizer_directory: Path) -> Any:
    limits = LimitsConfig(max_n=2, max_prompts=2, max_stops=2, max_logprobs=2, request_seconds=0.5)
    with serving(tokenizer_directory, limits=limits) as server:
        yield server


class TestDeadlines:
    def test_who_sets_a_timeout_gets_what_there_is(self, server: Server) -> None:
        server.runner.gate.clear()
        (choice,) = complete(server, timeout=0.05, max_tokens=400).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("", "length")
        server.runner.gate.set()
        server.wait_until_idle()

    def test_what_was_streamed_before_it_stays(self, server: Server) -> None:
        fields = {"prompt": "x", "stream": True, "timeout": 0.3, "max_tokens": 400, "ignore_eos": True}
        reasons = []
        with httpx.stream("POST", server.url + "/v1/completions", json=fields) as response:
            for line in filter(None, response.iter_lines()):
                server.runner.gate.clear()
                if line != "data: [DONE]":
                    reasons += [choice["finish_reason"] for choice in json.loads(line[6:])["choices"]]
        assert reasons[-1] == "length"
        assert set(reasons[:-1]) <= {None}
        assert len(reasons) < 400

    def test_the_servers_own_limit_is_an_error(self, limited: Server) -> None:
        limited.runner.gate.clear()
        try:
            response = complete(limited)
            assert (response.status_code, response.json()["error"]["code"]) == (408, "deadline_exceeded")
            *_, error, done, end = complete(limited, stream=True, n=2).text.split("\n\n")
            assert json.loads(error[6:])["error"]["code"] == "deadline_exceeded"
            assert (done, end) == ("data: [DONE]", "")
            assert complete(limited, timeout=0.05).status_code == 200  # his own comes first
        finally:
            limited.runner.gate.set()
        limited.wait_until_idle()

    @pytest.mark.parametrize("timeout", [0, -1, "soon"])
    def test_a_timeout_that_is_none_is_refused(self, server: Server, timeout: object) -> None:
        assert complete(server, timeout=timeout).json()["error"]["param"] == "timeout"

    def test_a_timeout_beyond_all_numbers_is_refused(self, client: httpx.Client) -> None:
        body = b'{"prompt": "x", "timeout": 1e400}'
        response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert response.json()["error"]["param"] == "timeout"


def test_several_names_for_one_model(tokenizer_directory: Path) -> None:
    llm, _ = make_llm(tokenizer_directory, other_names=("small", "gpt"))
    service, config = Service(llm), ServerConfig(port=0)
    try:
        assert service.find("gpt") is service.find("tiny") is service.find(None)
        server = HttpServer(make_app(service), service, config)
        with listen(config) as listening:
            thread = threading.Thread(target=server.run, args=([listening],))
            thread.start()
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            listed = [model["id"] for model in httpx.get(url + "/v1/models").json()["data"]]
            assert listed == ["tiny", "small", "gpt"]
            assert httpx.get(url + "/v1/models/gpt").json()["id"] == "gpt"
            assert httpx.post(url + "/v1/completions", json={"prompt": "x", "model": "small"}).json()["model"] == "tiny"
            server.stop()
            thread.join()
    finally:
        llm.close()


def test_pings_only_where_they_are_asked_for(tokenizer_directory: Path) -> None:
    body = {"prompt": "x", "stream": True, "max_tokens": 2, "ignore_eos": True}
    for ping_seconds in (0.0, 0.05):
        with serving(tokenizer_directory, ping_seconds=ping_seconds) as server:
            server.runner.gate.clear()
            threading.Timer(0.3, server.runner.gate.set).start()
            frames = httpx.post(server.url + "/v1/completions", json=body, timeout=30).text.split("\n\n")
            assert (": ping" in frames) == bool(ping_seconds)
            assert [frame for frame in frames if frame != ": ping"][-2:] == ["data: [DONE]", ""]


class TestLog:
    def read(self, caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
        wait_until(lambda: any(record.name == "qserve.requests" for record in caplog.records))
        return next(record for record in caplog.records if record.name == "qserve.requests")

    def test_one_line_a_request_and_nothing_of_the_prompt(
        self, client: httpx.Client, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        body = {"prompt": "my secret", "max_tokens": 4, "n": 2, "seed": 1, "ignore_eos": True}
        client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
        record = self.read(caplog)
        line = TextLines().format(record)
        assert "request_id=mine method=POST path=/v1/completions status=200 seconds=" in line
        assert "generations=2" in line
        assert "output_tokens=8" in line
        assert "finish_reason=length" in line
        assert "secret" not in line
        told = json.loads(JsonLines().format(record))
        assert (told["request_id"], told["output_tokens"], told["level"]) == ("mine", 8, "info")

    def test_what_clients_choose_cannot_forge_a_line(
        self, client: httpx.Client, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        client.get("/v1/%0Astatus=200%20x%E2%80%A8")
        line = TextLines().format(self.read(caplog))
        assert "\n" not in line
        assert r'path="/v1/\nstatus=200 x\u2028" status=404' in line

    def test_probes_are_no_news(self, client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        client.get("/health")
        client.get("/v1/models")
        assert "path=/v1/models" in TextLines().format(self.read(caplog))


VLLM_NAMES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "cache_config_info",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "prompt_tokens_total",
    "prompt_tokens_cached_total",
    "generation_tokens_total",
    "request_success_total",
    "admission_rejections_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "iteration_tokens_total",
    "request_num_preemptions",
    "request_prefill_kv_computed_tokens",
)


@pytest.mark.parametrize("prefix", ["qserve", "vllm"])
def test_metrics_have_vllms_names_and_count_what_was_done(tokenizer_directory: Path, prefix: str) -> None:
    with serving(tokenizer_directory, metrics_prefix=prefix) as server:
        complete(server, max_tokens=5, n=2, ignore_eos=True, seed=3)
        wait_until(lambda: "http_requests_total{" in httpx.get(server.url + "/metrics").text)
        text = httpx.get(server.url + "/metrics").text
    for name in VLLM_NAMES:
        assert re.search(rf"^{prefix}:{name}(_bucket)?\{{", text, re.MULTILINE), name
    expected = {
        f'{prefix}:request_success_total{{engine="0",finished_reason="length",model_name="tiny"}}': 2,
        f'{prefix}:request_success_total{{engine="0",finished_reason="stop",model_name="tiny"}}': 0,
        f'{prefix}:generation_tokens_total{{engine="0",model_name="tiny"}}': 10,
        f'{prefix}:inter_token_latency_seconds_count{{engine="0",model_name="tiny"}}': 8,
        f'{prefix}:request_max_num_generation_tokens_sum{{engine="0",model_name="tiny"}}': 5,
        f'{prefix}:request_params_n_sum{{engine="0",model_name="tiny"}}': 2,
        f'{prefix}:time_to_first_token_seconds_count{{engine="0",model_name="tiny"}}': 2,
        'http_requests_total{handler="/v1/completions",method="POST",status="2xx"}': 1,
    }
    shown = {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in text.splitlines()) if name[:1] != "#"
    }
    assert {name: shown[name] for name in expected} == expected
    assert "process_resident_memory_bytes" in text
