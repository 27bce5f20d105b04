"""The command line: flags from the config dataclasses, their precedence, and errors in one line."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import pytest

from qserve.cli import main
from qserve.config import AccessConfig, DeviceConfig, EngineConfig, LimitsConfig, ModelConfig, ServerConfig
from qserve.errors import UsageError
from qserve.options import add_file_option, add_options, read_file, read_options

CONFIGS = (ServerConfig, AccessConfig, LimitsConfig, EngineConfig, DeviceConfig)


def read(arguments: list[str], environment: Mapping[str, str], kind: type) -> object:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    add_file_option(parser)
    for config in CONFIGS:
        add_options(parser, config)
    given = parser.parse_args(arguments)
    file = read_file(given, (ModelConfig, *CONFIGS), environment=environment)
    return read_options(given, kind, environment=environment, file=file)


def write(directory: Path, text: str) -> str:
    path = directory / "qserve.toml"
    path.write_text(text)
    return str(path)


def test_a_flag_goes_before_the_environment_and_that_before_the_default() -> None:
    environment = {"QSERVE_PORT": "1", "QSERVE_HOST": "::1"}
    assert read(["--port", "2"], environment, ServerConfig) == ServerConfig(port=2, host="::1")
    assert read([], {}, ServerConfig) == ServerConfig()


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["--no-prefix-caching"], {}, EngineConfig(prefix_caching=False)),
        ([], {"QSERVE_PREFIX_CACHING": "off"}, EngineConfig(prefix_caching=False)),
        (["--prefix-caching"], {"QSERVE_PREFIX_CACHING": "0"}, EngineConfig()),
        (["--api-key", "a", "--api-key", "b"], {}, AccessConfig(api_key=("a", "b"))),
        ([], {"QSERVE_API_KEY": "a, b"}, AccessConfig(api_key=("a", "b"))),
        ([], {"QSERVE_KERNELS": "reference"}, DeviceConfig(kernels="reference")),
        ([], {"QSERVE_DRAIN_SECONDS": "1.5"}, ServerConfig(drain_seconds=1.5)),
        (["--served-model-name", "a", "--served-model-name", "b"], {}, ServerConfig(served_model_name=("a", "b"))),
        ([], {"QSERVE_PORT": "tcp://10.0.0.1:8000"}, ServerConfig()),  # set by Kubernetes, and not meant for us
    ],
)
def test_every_kind_of_value(arguments: list[str], environment: Mapping[str, str], expected: object) -> None:
    assert read(arguments, environment, type(expected)) == expected


@pytest.mark.parametrize("environment", [{"QSERVE_PORT": "many"}, {"QSERVE_KERNELS": "fast"}])
def test_a_bad_value_in_the_environment_is_named(environment: Mapping[str, str]) -> None:
    (name,) = environment
    with pytest.raises(UsageError, match=name):
        read([], environment, ServerConfig if "PORT" in name else DeviceConfig)


def test_the_file_goes_before_the_default_alone(tmp_path: Path) -> None:
    path = write(tmp_path, 'port = 1\nhost = "::1"\ndrain-seconds = 3\nmodel = "here"\nserved_model_name = "a"')
    file = {"QSERVE_CONFIG": path}
    environment = {**file, "QSERVE_HOST": "0.0.0.0"}
    expected = ServerConfig(port=2, host="0.0.0.0", drain_seconds=3.0, served_model_name=("a",))
    assert read(["--port", "2"], environment, ServerConfig) == expected
    assert read(["--port", "2", "--config", path], {"QSERVE_HOST": "0.0.0.0"}, ServerConfig) == expected
    assert read([], file, ModelConfig) == ModelConfig(model="here")
    assert read(["there"], file, ModelConfig) == ModelConfig(model="there")
    assert read([], {**file, "QSERVE_MODEL": "elsewhere"}, ModelConfig) == ModelConfig(model="elsewhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "sets 'prot', which is no option. Did you mean 'port'"),
        ("[server]\nport = 1", "sets 'server', which is no option"),
        ("port = '1'", "port in the config file is '1': expected int"),
        ("port = true", "expected int"),
        ("port = 1.5", "expected int"),
        ("port = 70000", "expected 0 to 65535"),
        ("api_key = [1]", "expected list of str"),
        ("device = 'tpu'", "expected one of cpu, cuda"),
        ("drain_seconds = nan", "expected 0 or more"),
        ("port =", "is not TOML"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError, match=re.escape(message)):
        [read(["--config", path], {}, config) for config in CONFIGS]


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="No such file"):
        read(["--config", "/nowhere.toml"], {}, ServerConfig)


@pytest.mark.parametrize(("arguments", "kind"), [(["--port", "70000"], ServerConfig), (["--max-n", "0"], LimitsConfig)])
def test_a_number_out_of_range_is_named(arguments: list[str], kind: type) -> None:
    with pytest.raises(UsageError, match=arguments[0]):
        read(arguments, {}, kind)


def test_help_tells_every_option_and_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for config in CONFIGS:
        for field in fields(config):
            assert f"QSERVE_{field.name.upper()}" in told.replace(" ", "")
    assert "A flag goes before the environment, that before the file, and that before the default" in told


def test_help_teaches_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert "qserve serve ORG/NAME" in told
    assert "inspect" in told
