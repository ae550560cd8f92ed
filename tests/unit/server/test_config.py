from __future__ import annotations

from pathlib import Path

import pytest

from motet.adapters.spec import Declared, LossyForm
from motet.server.config import OptionError, parse_adapter, parse_bytes, read_keys


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", None),
        ("0", 0),
        ("1000000", 10**6),
        ("1000B", 1000),
        ("2kB", 2000),
        ("512MiB", 512 << 20),
        ("2GiB", 2 << 30),
        ("1.5 gib", 3 << 29),
        (" 3MB ", 3 * 10**6),
    ],
)
def test_bytes(text: str, expected: int | None) -> None:
    assert parse_bytes("kv-memory", text) == expected


@pytest.mark.parametrize("text", ["", "plenty", "-1", "1TiB", "GiB", "1e9", "1,5GiB", "0x10", "1 GiB 2", "٣GiBB"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(OptionError, match="--kv-memory") as error:
        parse_bytes("kv-memory", text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("text", "name", "path", "declared"),
    [
        ("sql=adapters/wikisql", "sql", "adapters/wikisql", Declared()),
        ("tenant/a:1=/x=y", "tenant/a:1", "/x=y", Declared()),
        ("a=b,initial=c=d", "a", "b", Declared(initial=Path("c=d"))),
        ("a=b,residual=m,trained-on-base", "a", "b", Declared(residual=Path("m"), trained_on_base=True)),
        ("a=b,residual=m,initial=i", "a", "b", Declared(initial=Path("i"), residual=Path("m"))),
        ("a=b,approximate=svd-16", "a", "b", Declared(approximate=LossyForm(16))),
        ("a=b,approximate=1bit,residual=m", "a", "b", Declared(residual=Path("m"), approximate=LossyForm())),
    ],
)
def test_adapter(text: str, name: str, path: str, declared: Declared) -> None:
    assert parse_adapter(text) == (name, Path(path), declared)


def test_a_home_folder_is_resolved() -> None:
    home = Path.home()
    declared = Declared(home / "first", home / "model")
    assert parse_adapter("x=~/a,initial=~/first,residual=~/model") == ("x", home / "a", declared)


@pytest.mark.parametrize(
    "part",
    [
        "",
        "initial",
        "initial=",
        "residual=",
        "trained-on-base=",
        "trained-on-base=yes",
        "trained_on_base",
        "other=x",
        "approximate",
    ],
)
def test_an_unknown_declaration_is_refused(part: str) -> None:
    with pytest.raises(OptionError, match="none of initial=DIR") as error:
        parse_adapter(f"x=y,{part}")
    assert repr(part) in str(error.value)


def test_a_declaration_twice_is_refused() -> None:
    for part in ("initial=a,initial=b", "trained-on-base,trained-on-base", "approximate=1bit,approximate=svd-1"):
        with pytest.raises(OptionError, match="at most once"):
            parse_adapter(f"x=y,{part}")


def test_an_unknown_lossy_form_is_refused() -> None:
    with pytest.raises(OptionError, match="--adapter 'x=y,approximate=2bit': approximate '2bit' is no form"):
        parse_adapter("x=y,approximate=2bit")


@pytest.mark.parametrize("text", ["", "=", "name", "name=", "=path", "adapters/wikisql"])
def test_an_adapter_without_name_or_path_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="NAME=PATH"):
        parse_adapter(text)


class TestKeys:
    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("A_KEY", raising=False)

    def test_no_file_no_variable_no_keys(self) -> None:
        assert read_keys("api-key-file", None, "A_KEY") == ()

    def test_one_per_line_without_the_white_space_around(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text("\n  first \n\nsecond\t\r\n")
        assert read_keys("api-key-file", str(file), "A_KEY") == ("first", "second")

    def test_the_variable_counts_as_well(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "keys"
        file.write_text("first")
        monkeypatch.setenv("A_KEY", " of-the-environment\n")
        assert read_keys("api-key-file", None, "A_KEY") == ("of-the-environment",)
        assert set(read_keys("api-key-file", str(file), "A_KEY")) == {"of-the-environment", "first"}

    def test_an_empty_variable_is_no_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("A_KEY", " \n")
        assert read_keys("api-key-file", None, "A_KEY") == ()

    @pytest.mark.parametrize("content", ["", "\n \n"])
    def test_a_file_without_a_key_is_refused(self, tmp_path: Path, content: str) -> None:
        """It would open what someone meant to lock."""
        file = tmp_path / "keys"
        file.write_text(content)
        with pytest.raises(OptionError, match=r"--api-key-file .* holds no key"):
            read_keys("api-key-file", str(file), "A_KEY")

    def test_a_file_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match=r"--admin-key-file .* cannot be read"):
            read_keys("admin-key-file", str(tmp_path / "none"), "A_KEY")

    def test_a_file_that_is_no_text_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_bytes(b"\xff\xfe\x00secret")
        with pytest.raises(OptionError, match="--api-key-file") as error:
            read_keys("api-key-file", str(file), "A_KEY")
        assert "secret" not in str(error.value)
