"""Loading tokenizers of both kinds, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megarl.data.tokenizer import check_vocabulary, load_tokenizer, prompt_ids, response_ids
from megarl.errors import Refusal
from megarl.formats.companions import copy_companions

ROOT = Path(__file__).resolve().parents[1]
LLAMA = ROOT.parent / "shared" / "data" / "llama2_tokenizer.model"
needs_llama = pytest.mark.skipif(not LLAMA.is_file(), reason=f"{LLAMA} is absent")

TEXT = "the quick brown fox jumps over the lazy dog 0123456789 the fox and the dog run"


def sentencepiece_model(path: Path, **options: Any) -> Path:
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([TEXT] * 20),
        model_prefix=str(path.with_suffix("")),
        vocab_size=44,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return path


def hugging_face_folder(path: Path, start: bool = False, **config: object) -> Path:
    """A word-level tokenizer in Hugging Face's format, with a marker, an end token and, if asked, a start token."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "user", "1", "2", "+"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    inner.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    inner.add_tokens([AddedToken("<think>", special=False)])
    if start:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # type: ignore[assignment]
    path.mkdir()
    inner.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"} | config
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def test_hugging_face_directory(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} <think>{% endif %}"
    )
    tokenizer = load_tokenizer(hugging_face_folder(tmp_path / "t", chat_template=template))
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos) == (8, 2, 2, None)
    assert tokenizer.encode("1+<think>2") == [0, 7, 5]
    assert tokenizer.encode("1 <think> 2") == [4, 7, 5]
    assert tokenizer.apply_chat([{"role": "user", "content": "1 + 2"}]) == [3, 4, 6, 5, 7]
    # Control tokens and ids of a padded vocabulary are silent, markers are not.
    assert tokenizer.decode([4, 7, 2, 99, 1]) == "1 <think>"
    assert prompt_ids(tokenizer, "1") == [4]
    assert response_ids(tokenizer, "1 + 2") == [4, 6, 5, 2]


def test_a_start_token_that_the_tokenizer_adds_begins_prompts_and_nothing_else(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(hugging_face_folder(tmp_path / "t", start=True))
    assert tokenizer.bos == 1
    assert tokenizer.encode("1") == [4]
    assert prompt_ids(tokenizer, "1") == [1, 4]
    # No template: contents with blank lines between them.
    assert tokenizer.apply_chat([{"role": "system", "content": "2"}, {"role": "user", "content": "1"}]) == [1, 5, 4]


def test_sentencepiece_file_and_directory_are_the_same(tmp_path: Path) -> None:
    file = sentencepiece_model(tmp_path / "tokenizer.model", pad_id=3)
    tokenizer = load_tokenizer(str(file))
    assert tokenizer.vocab_size == len(sentencepiece.SentencePieceProcessor(model_file=str(file)))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos) == (2, 3, 1)
    assert tokenizer.decode([1, *tokenizer.encode("the dog run"), 2, 3, 12345, -1]) == "the dog run"
    assert load_tokenizer(tmp_path).encode("the fox") == tokenizer.encode("the fox")
    assert tokenizer.apply_chat([{"role": "user", "content": "the fox"}]) == [1, *tokenizer.encode("the fox")]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"must be a directory with a tokenizer\.json"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(Refusal, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(Refusal, match="has no end token"):
        load_tokenizer(sentencepiece_model(tmp_path / "endless.model", eos_id=-1))
    with pytest.raises(Refusal, match="has no end token"):
        load_tokenizer(hugging_face_folder(tmp_path / "endless", eos_token=None))
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(Refusal, match="must be a sentencepiece model"):
        load_tokenizer(tmp_path / "broken.model")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(Refusal, match="cannot be read by transformers"):
        load_tokenizer(tmp_path / "broken")


def test_the_vocabulary_must_fit_the_model(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path / "tokenizer.model"))
    size = tokenizer.vocab_size
    check_vocabulary(tokenizer, size)
    check_vocabulary(tokenizer, size + 24)
    with pytest.raises(
        Refusal, match=f"a tokenizer of {size} tokens: must not exceed the model's vocabulary of {size - 1}"
    ):
        check_vocabulary(tokenizer, size - 1)


@needs_llama
def test_the_llama_tokenizer() -> None:
    tokenizer = load_tokenizer(LLAMA)
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos) == (32000, 2, 2, 1)
    assert tokenizer.encode("Hello world") == [15043, 3186]
    for text in ("Hello world", "x = 12\n\ny < 3 <think>é日本</think>\n", "\\boxed{42}"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_needs_no_transformers_and_neither_kind_imports_torch(tmp_path: Path) -> None:
    file = sentencepiece_model(tmp_path / "tokenizer.model")
    folder = hugging_face_folder(tmp_path / "t")
    program = (
        "import sys\n"
        "from megarl.data.tokenizer import load_tokenizer\n"
        f"load_tokenizer({str(file)!r}).encode('the')\n"
        "print({'torch', 'transformers'} & set(sys.modules))\n"
        f"load_tokenizer({str(folder)!r}).encode('1')\n"
        "print('torch' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split("\n")[:2] == ["set()", "False"]


#: Llama 2's, for conversations of a user and the assistant.
LLAMA_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant speak') }}{% endif %}"
    "{% endfor %}"
)


@needs_llama
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_real_sentencepiece_model_reads_all_of_gsm8k_as_the_library_does(split: str) -> None:
    file = LLAMA.parent / f"gsm8k_{split}.jsonl"
    library, tokenizer = sentencepiece.SentencePieceProcessor(str(LLAMA)), load_tokenizer(LLAMA)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == {"train": 7473, "test": 1319}[split]
    for text in (row[column] for row in rows for column in ("question", "answer")):
        ids = library.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == library.decode(ids)


@needs_llama
@pytest.mark.parametrize("kept_as", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_template_beside_a_real_sentencepiece_model(kept_as: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").symlink_to(LLAMA)
    config = json.dumps({"chat_template": LLAMA_TEMPLATE})
    (tmp_path / kept_as).write_text(LLAMA_TEMPLATE if kept_as.endswith("jinja") else config)
    library, tokenizer = sentencepiece.SentencePieceProcessor(str(LLAMA)), load_tokenizer(tmp_path / "tokenizer.model")
    questions = [
        json.loads(line)["question"] for line in (LLAMA.parent / "gsm8k_test.jsonl").read_text().splitlines()[:200]
    ]
    for first, second in zip(questions[::2], questions[1::2], strict=True):
        talk = [("user", first), ("assistant", "It is 4."), ("user", second)]
        found = tokenizer.apply_chat([{"role": role, "content": content} for role, content in talk])
        assert found == [
            1,
            *library.encode(f"[INST] {first.strip()} [/INST] It is 4. "),
            2,
            1,
            *library.encode(f"[INST] {second.strip()} [/INST]"),
        ]
    with pytest.raises(Refusal, match=r"cannot render a prompt \(only user and assistant speak\)"):
        tokenizer.apply_chat([{"role": "system", "content": "Be brief."}])


def test_chat_template_beside_a_sentencepiece_model(tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}")
    tokenizer = load_tokenizer(model)
    wanted = [1, *tokenizer.encode("the fox"), 2]
    assert load_tokenizer(tmp_path).apply_chat([{"role": "user", "content": "the fox"}]) == wanted
    named = [{"name": "tool_use", "template": "-"}, {"name": "default", "template": "{{ messages[0]['content'] }}"}]
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(model).apply_chat([{"role": "user", "content": "the fox"}]) == wanted[1:-1]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(Refusal, match=r"chat templates of .* \(tool_use\): must include a text called default"):
        load_tokenizer(model)


NAMED = [{"name": "tool_use", "template": "-"}, {"name": "default", "template": "{{ messages[0]['content'] }} <think>"}]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": NAMED},
        {"tokenizer_config.json": NAMED[1]["template"]},
        {"chat_template.jinja": NAMED[1]["template"]},
        {"chat_template.jinja": NAMED[1]["template"], "tokenizer_config.json": "-"},
        {"additional_chat_templates/default.jinja": NAMED[1]["template"], "additional_chat_templates/other.jinja": "-"},
        {"additional_chat_templates/tool_use.jinja": "-", "tokenizer_config.json": NAMED},
        {"chat_templates/default.jinja": NAMED[1]["template"], "chat_templates/tool_use.jinja": "-"},
        {"chat_template.json": NAMED[1]["template"]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["hugging_face", "sentencepiece"])
def test_the_default_template_in_every_form(tmp_path: Path, kind: str, files: dict[str, Any]) -> None:
    if kind == "hugging_face":
        folder = hugging_face_folder(tmp_path / "t", chat_template=files.get("tokenizer_config.json"))
    else:
        folder = sentencepiece_model(tmp_path / "tokenizer.model").parent
    for name, template in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".jinja"):
            (folder / name).write_text(template)
        elif not (kind == "hugging_face" and name == "tokenizer_config.json"):
            (folder / name).write_text(json.dumps({"chat_template": template}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == NAMED[1]["template"]
    wanted = [4, 7] if kind == "hugging_face" else tokenizer.encode("1 <think>")
    assert tokenizer.apply_chat([{"role": "user", "content": "1"}]) == wanted


def test_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"chat templates of .* \(tool_use\): must include a text called default"):
        load_tokenizer(hugging_face_folder(tmp_path / "t", chat_template=NAMED[:1]))
    with pytest.raises(Refusal, match="must be JSON"):
        (tmp_path / "u").mkdir()
        sentencepiece_model(tmp_path / "u" / "tokenizer.model")
        (tmp_path / "u" / "tokenizer_config.json").write_text("[")
        load_tokenizer(tmp_path / "u" / "tokenizer.model")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only\nuser speaks') }}", r"cannot render a prompt \(only user speaks\)"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ messages[0]['content'] }", "unexpected"),
        ("{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}", "role user"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["hugging_face", "sentencepiece"])
def test_a_template_that_fails_is_named(tmp_path: Path, kind: str, template: str, message: str) -> None:
    if kind == "hugging_face":
        folder = hugging_face_folder(tmp_path / "t", chat_template=template)
    else:
        folder = sentencepiece_model(tmp_path / "tokenizer.model").parent
        (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(folder)
    with pytest.raises(Refusal, match=message) as caught:
        tokenizer.apply_chat([{"role": "user", "content": "1 + 2"}])
    origin = folder if kind == "hugging_face" else folder / "tokenizer.model"
    assert caught.value.value == f"the chat template of {origin}"


def test_a_checkpoints_companions_are_all_kept(tmp_path: Path) -> None:
    names = ["config.json", "tokenizer.model.v3", "chat_template.jinja", "chat_template.json", "spiece.model"]
    names += ["additional_chat_templates/tool_use.jinja", "chat_templates/default.jinja", "tokenization_own.py"]
    source, target = tmp_path / "source", tmp_path / "target"
    for name in [*names, "model.safetensors", "optimizer.pt"]:
        (source / name).parent.mkdir(exist_ok=True, parents=True)
        (source / name).write_text(name)
    target.mkdir()
    copy_companions(source, target)
    assert sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()) == sorted(names)
    assert all((target / name).read_text() == name for name in names)
