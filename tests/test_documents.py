"""What the documents say is there: links, paths, commands, examples."""

import importlib.util
import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch

from adamem_fused import AMAdamW

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "adamem_fused" / "_cpu.so"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "bench/results/*/*.md")
    for path in ROOT.glob(pattern)
)
# Where a path may begin; what is made is not there yet.
FOLDERS = (ROOT, ROOT / "adamem_fused", ROOT / "bench")
MADE = ("build/", "dist/")

FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^(?: {4}.*\n)+", re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
NEEDS = re.compile(r"<!-- needs [^>]+ -->\n+$")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def words_of(text):
    """A document without its code."""
    return SPAN.sub("", FENCED.sub("", text))


def code_of(text):
    """A document's code, in spans and blocks."""
    rest = FENCED.sub("", text)
    blocks = [block for _, _, block in FENCED.findall(text)] + INDENTED.findall(rest)
    return [*blocks, *SPAN.findall(rest)]


def anchors_of(text):
    """The headings' anchors, as GitHub makes them. One that is there twice would have a number."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link in LINK.findall(words_of(document.read_text())):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target.read_text()), link


def is_there(path):
    if path.startswith(MADE) or path.endswith(".so"):
        return True
    return any(any(folder.glob(path)) for folder in FOLDERS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_are_there(document):
    tops = {path.name for folder in FOLDERS for path in folder.iterdir() if path.is_dir()}
    for span in SPAN.findall(FENCED.sub("", document.read_text())):
        if "/" not in span:
            is_path = re.fullmatch(r"[\w.]+\.(md|toml|cff)|Makefile|setup\.py", span)
        else:
            is_path = re.fullmatch(r"[\w./*-]+", span) and span.split("/")[0] in tops
        assert not is_path or is_there(span), span


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_there(document):
    rules = re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = " ".join(rules).split()
    for code in code_of(document.read_text()):
        for target in re.findall(r"(?:^|[`\s])make ([a-z][\w-]*)", code):
            assert target in targets, f"make {target}"
        for module in re.findall(r"python3? -m ((?:adamem_fused|bench)[\w.]*)", code):
            assert importlib.util.find_spec(module), module


needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason=f"{LIBRARY} was not compiled")

# What the blocks of a section take for granted, beside all that stands before them on their page.
SET_UP = {
    "docs/migrating.md#checkpoints": """
        import torch
        from adamem_fused import AMSGD
        model, momentum = torch.nn.Linear(4, 2), 0.9
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        model(torch.randn(8, 4)).square().mean().backward()
        sgd.step()
        optimizer = AMSGD(model.parameters())
        optimizer.load_state_dict(sgd.state_dict())
    """,
    "docs/options.md#one-beta-a-row": """
        import torch
        model = torch.nn.Sequential(torch.nn.Embedding(9, 32), torch.nn.Linear(32, 16))
    """,
    "docs/options.md#reading-beta": """
        model(torch.arange(9)).square().mean().backward()
        optimizer.step()
    """,
    "docs/training_loop.md#gradient-release": """
        optimizer = AMAdamW(model.parameters())
        model.register_forward_hook(lambda module, args, output: output.square().mean())
        steps = torch.randn(3, 2, 8, 10)
    """,
    "docs/training_loop.md#numbers-to-look-at": """
        batches, history, log = range(2), [], print
    """,
    "docs/trainers.md#a-skipped-step": "import torch",
}


def sections(text):
    """Anchor, start and text of what stands before the first heading but the title, and of each."""
    anchor, start = "", 0
    for heading in re.finditer(r"^##+ .+$", text, re.MULTILINE):
        yield anchor, start, text[start : heading.start()]
        (anchor,), start = anchors_of(heading[0]), heading.start()
    yield anchor, start, text[start:]


def programs(document):
    """What runs of a document's Python, in order, each as (code, the lines before it).

    A block under a comment such as <!-- needs torchao --> does not.
    """
    name, text = document.relative_to(ROOT).as_posix(), document.read_text()
    for anchor, start, section in sections(text):
        blocks = [
            (textwrap.dedent(block[3]), text.count("\n", 0, start + block.start(3)))
            for block in FENCED.finditer(section)
            if block[2] == "python" and not NEEDS.search(section[: block.start()])
        ]
        set_up = SET_UP.get(f"{name}#{anchor}" if anchor else name)
        if set_up is not None:
            assert blocks, f"nothing runs in {name}#{anchor}, which is set up"
            yield textwrap.dedent(set_up), 0
        yield from blocks


@needs_library
@pytest.mark.parametrize(
    "document",
    [document for document in DOCUMENTS if any(programs(document))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_python_of_a_document_runs(document, tmp_path, monkeypatch):
    """All of it in order, as one program."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for code, before in programs(document):
        # So that an error names the document's line.
        exec(compile("\n" * before + code, document, "exec"), names)


@needs_library
def test_the_kernels_are_called_without_torch_as_the_example_does(tmp_path):
    blocks = FENCED.findall((ROOT / "docs/architecture.md").read_text())
    (source,) = [block for _, language, block in blocks if language == "cpp"]
    program = tmp_path / "example"
    (tmp_path / "example.cpp").write_text(source)
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{ROOT}", tmp_path / "example.cpp", LIBRARY, f"-Wl,-rpath,{LIBRARY.parent}"]
    subprocess.run([*command, "-o", program], check=True)
    given = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    param = torch.nn.Parameter(torch.ones(1000))
    param.grad = torch.full_like(param, 0.5)
    optimizer = AMAdamW([param], lr=1e-3, weight_decay=0.1, backend="reference")
    for _ in range(3):
        optimizer.step()
    expected = [param[0], optimizer.state[param]["beta"]]
    torch.testing.assert_close([torch.tensor(float(x)) for x in given.split()], expected)
