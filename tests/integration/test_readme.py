"""The README's code runs as it stands: every block marked `<!-- tested -->`, in order, in one namespace.

    <!-- tested -->
    ```python
    trainer = Trainer(max_epochs=2, callbacks=[GradientSnapshot("influence")])
    trainer.fit(module, train_loader)
    ```

What a reader brings along is there under the names of `stand_ins`; everything else a block must define itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import seed_everything

from tests.callbacks.fits import WARNINGS
from tests.integration.project import VOCABULARY, Library, Reader, sentences

pytestmark = [pytest.mark.filterwarnings(each) for each in WARNINGS]

README = Path(__file__).parents[2] / "README.md"
_BLOCK = re.compile(r"^<!-- tested -->\s*\n```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def stand_ins() -> dict[str, Any]:
    """The reader's own module and data."""
    seed_everything(3, verbose=False)
    library = Library()
    library.setup("fit")
    loader = library.predict_dataloader()
    return {
        "module": Reader(),
        "finetuned": Reader(),
        "finetuning_loader": library.train_dataloader(),
        "MyModule": Reader,
        "data": library,
        "train_loader": library.train_dataloader(),
        "val_loader": library.val_dataloader(),
        "test_loader": loader,
        "query_loader": loader,
        "forget_loader": library.predict_dataloader(),
        "ids": [1, 3],
        "batch": next(iter(loader)),
        "decode": VOCABULARY.__getitem__,
        "texts": sentences(library.count),
    }


def run(text: str, name: str = "README.md") -> dict[str, Any]:
    """Run the marked blocks of a page; an error points at its line of the page."""
    namespace = stand_ins()
    for block in _BLOCK.finditer(text):
        above = text[: block.start(1)].count("\n")
        exec(compile("\n" * above + block[1], name, "exec"), namespace)
    return namespace


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:.*stopped before its tolerance")
@pytest.mark.filterwarnings("ignore:The model was far from a stationary point")  # three epochs of five steps
def test_the_readme_runs(tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8")
    assert len(_BLOCK.findall(text)) == 6, "blocks to fit, query, with curvature, to edit, through two runs, to judge"
    monkeypatch.chdir(tmp_path)
    run(text)


PAGE = """
<!-- tested -->
```python fit
length = len(train_loader)
```
Not marked:
```python
1 / 0
```
<!-- tested -->

```python query
words = [decode(int(t)) for t in batch["tokens"][0] if t]
found = (length, words)
```
"""


def test_marked_blocks_run_in_one_namespace_and_others_do_not():
    assert run(PAGE)["found"] == (4, ["the", "bird", "grows"])
    with pytest.raises(ZeroDivisionError) as failed:
        run(PAGE.replace("Not marked:", "<!-- tested -->"))
    assert failed.traceback[-1].lineno == 7  # counted from zero: the line of the page
