"""The command line: flags from the config dataclasses, their precedence, and errors in one line."""

import argparse
from collections.abc import Mapping
from dataclasses import fields

import pytest

from qserve.cli import main
from qserve.config import DeviceConfig, EngineConfig, ServerConfig
from qserve.errors import UsageError
from qserve.options import add_options, read_options

CONFIGS = (ServerConfig, EngineConfig, DeviceConfig)


def read(arguments: list[str], environment: Mapping[str, str], kind: type) -> object:
    parser = argparse.ArgumentParser()
    for config in CONFIGS:
        add_options(parser, config)
    return read_options(parser.parse_args(arguments), kind, environment=environment)


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
        (["--api-key", "a", "--api-key", "b"], {}, ServerConfig(api_key=("a", "b"))),
        ([], {"QSERVE_API_KEY": "a, b"}, ServerConfig(api_key=("a", "b"))),
        ([], {"QSERVE_KERNELS": "reference"}, DeviceConfig(kernels="reference")),
        ([], {"QSERVE_DRAIN_SECONDS": "1.5"}, ServerConfig(drain_seconds=1.5)),
    ],
)
def test_every_kind_of_value(arguments: list[str], environment: Mapping[str, str], expected: object) -> None:
    assert read(arguments, environment, type(expected)) == expected


@pytest.mark.parametrize("environment", [{"QSERVE_PORT": "many"}, {"QSERVE_KERNELS": "fast"}])
def test_a_bad_value_in_the_environment_is_named(environment: Mapping[str, str]) -> None:
    (name,) = environment
    with pytest.raises(UsageError, match=name):
        read([], environment, ServerConfig if "PORT" in name else DeviceConfig)


def test_help_tells_every_option_and_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for config in CONFIGS:
        for field in fields(config):
            assert f"QSERVE_{field.name.upper()}" in told.replace(" ", "")


def test_help_teaches_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert "qserve serve ORG/NAME" in told
    assert "inspect" in told
