import openai

from octavo_client import errors


def test_tree_is_the_one_in_the_docstring() -> None:
    assert errors.__doc__ is not None
    drawn: list[type[BaseException]] = []
    for line in errors.__doc__.splitlines():
        name = line.split()[0] if line.startswith("    ") and line.split() else ""
        if name in errors.__all__:
            depth = (len(line) - len(line.lstrip()) - 4) // 2
            drawn[depth:] = [getattr(errors, name)]
            assert depth == 0 or drawn[depth - 1] in drawn[depth].__bases__, name
    names = {line.split()[0] for line in errors.__doc__.splitlines() if line.startswith("    ")}
    assert names == set(errors.__all__)


def test_sdk_errors_are_the_sdks_own() -> None:
    ours = {"ConfigurationError", "InvalidAnswerError", "OctavoError"}
    for name in set(errors.__all__) - ours:
        assert getattr(errors, name) is getattr(openai, name)


def test_our_errors_are_caught_with_the_sdks() -> None:
    assert issubclass(errors.OctavoError, openai.OpenAIError)
    assert issubclass(errors.ConfigurationError, ValueError)
