import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_dist.config import RunConfig, load_run
from vlm_dist.errors import ConfigError

REPOSITORY = Path(__file__).parents[3]


class Project:
    """A working directory with the shipped files, where a test changes some of them and loads the run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(REPOSITORY / "configs", root / "configs")
        (root / "ds_configs").mkdir()
        (root / "ds_configs" / "zero2.json").write_text("{}")

    def write(self, name: str, text: str) -> None:
        (self.root / "configs" / name).write_text(text)

    def replace(self, name: str, old: str, new: str) -> int:
        """Change a shipped file; returns the line number of the change."""
        path = self.root / "configs" / name
        text = path.read_text()
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {name}"
        path.write_text(text.replace(old, new))
        return text[: text.index(old)].count("\n") + 1

    def load(self, *overrides: str) -> RunConfig:
        return load_run(Path("configs/run.yaml"), overrides)

    def problems(self, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as error:
            self.load(*overrides)
        return str(error.value).splitlines()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


@pytest.fixture
def only_problem(project: Project) -> Callable[..., str]:
    """Load with `--set` and return the one problem that there must be."""

    def find(*overrides: str) -> str:
        problems = project.problems(*overrides)
        assert len(problems) == 1, problems
        return problems[0]

    return find
