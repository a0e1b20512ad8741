"""Catches: text that does not come back from its ids, special tokens slipped into documents, a tokenizer whose ids
exceed the model's vocabulary, and tokenizer files that fail with a riddle."""

import json
import shutil

import numpy as np
import pytest

from lightning_npu_tp.errors import DataError
from lit_models.data import TextDataModule
from lit_models.data.streams import StreamBuilder
from lit_models.data.tokenizers import ByteTokenizer, check_vocabulary, load_tokenizer

CHINESE = "深度学习：混合专家模型 DeepSeek-V2 在昇腾上训练。\n\tnaïve 🙂 café\r\n"
BOS, END = "<|begin|>", "<|end|>"


def make_tokenizer(folder, *, with_eos: bool = True):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BOS, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([CHINESE * 5, "def train(model): return model\n" * 5], trainer)
    # As DeepSeek's tokenizer does, it puts the begin token before every text unless told not to.
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    bpe.enable_truncation(max_length=16)
    named = {"bos_token": BOS, "eos_token": END} if with_eos else {"bos_token": BOS}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **named).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("text", [CHINESE, "", "\x00\x7f", "𠮷" * 3])
def test_bytes_round_trip_any_text(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text


def test_bytes_have_three_special_ids_that_decode_to_nothing():
    tokenizer = ByteTokenizer()
    specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert sorted(specials) == [256, 257, 258]
    assert tokenizer.vocab_size == 259
    assert tokenizer.decode([*specials, *tokenizer.encode("中")]) == "中"
    assert tokenizer.decode(tokenizer.encode("中")[:2]) == "\ufffd"


def test_no_path_means_bytes():
    assert isinstance(load_tokenizer(None), ByteTokenizer)


def test_a_hugging_face_tokenizer_round_trips_chinese_whole_and_without_special_tokens(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(CHINESE)
    assert len(ids) > 16  # the file asks for a truncation to 16 tokens, which must not lose text here
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == CHINESE
    assert not {0, 1} & set(ids.tolist())  # neither begin nor end was added
    assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.pad_id]) == CHINESE


def test_eos_serves_as_padding_and_the_largest_id_decides_the_vocabulary(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == tokenizer.pad_id == 1
    largest = max(tokenizer.encode(bytes(range(33, 127)).decode() + CHINESE * 9).tolist())
    assert 256 < largest < tokenizer.vocab_size <= 300


def test_a_tokenizer_json_is_enough_if_the_end_token_is_named(folder, tmp_path):
    alone = shutil.copy(folder / "tokenizer.json", tmp_path)
    with pytest.raises(DataError, match=r"names no end token \(eos\).* data\.eos_token .*<\|end\|>"):
        load_tokenizer(alone)
    tokenizer = load_tokenizer(alone, eos_token=END)
    assert (tokenizer.eos_id, tokenizer.decode(tokenizer.encode(CHINESE))) == (1, CHINESE)
    with pytest.raises(DataError, match=r"data\.eos_token='</s>' is not in the vocabulary"):
        load_tokenizer(alone, eos_token="</s>")


def test_a_tokenizer_json_is_read_with_the_settings_that_lie_beside_it(folder):
    assert load_tokenizer(folder / "tokenizer.json").eos_id == 1


def test_a_folder_that_names_no_end_token_is_refused(tmp_path):
    with pytest.raises(DataError, match="names no end token"):
        load_tokenizer(make_tokenizer(tmp_path, with_eos=False))


def test_a_fingerprint_is_that_of_vocabulary_and_rules_wherever_the_files_lie(folder, tmp_path):
    first = load_tokenizer(folder)
    copy = load_tokenizer(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert first.fingerprint() == copy.fingerprint() and first.path != copy.path == str(tmp_path / "elsewhere")
    first.encode(CHINESE)
    first.transformers("text", truncation=True, max_length=4)  # what was called before has no say
    assert first.fingerprint() == copy.fingerprint()
    rules = json.loads((folder / "tokenizer.json").read_text())
    for key, value in (("normalizer", {"type": "NFC"}), ("pre_tokenizer", None)):
        (tmp_path / "elsewhere" / "tokenizer.json").write_text(json.dumps({**rules, key: value}))
        assert load_tokenizer(tmp_path / "elsewhere").fingerprint() != first.fingerprint()
    rules["model"]["merges"].reverse()
    (tmp_path / "elsewhere" / "tokenizer.json").write_text(json.dumps(rules))
    assert load_tokenizer(tmp_path / "elsewhere").fingerprint() != first.fingerprint()
    assert load_tokenizer(folder, eos_token=BOS).fingerprint() != first.fingerprint()
    # A known value: a hash that differs between machines or processes shows.
    assert ByteTokenizer().fingerprint() == "5f838255ca070ebdf51530c962584c72" and ByteTokenizer.path is None


def test_several_texts_at_once_have_the_ids_of_each_alone(folder):
    tokenizer = load_tokenizer(folder)
    texts = [CHINESE * 3, "", " ", "def train(model):\n", END + "x"]
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        assert np.array_equal(ids, tokenizer.encode(text))
    ids, begins, ends = tokenizer.encode_with_offsets(CHINESE)
    assert np.array_equal(ids, tokenizer.encode(CHINESE)) and begins[0] == 0 and ends[-1] == len(CHINESE)
    assert (begins[1:] >= begins[:-1]).all() and (ends >= begins).all()


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.tokenizer='.*nowhere' does not exist"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("val_fraction", [0, 0.5])
def test_a_begin_token_stands_before_each_document_where_it_is_asked_for(folder, tmp_path, val_fraction):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("train the model " * (number + 1))
    settings = {"source": "text", "tokenizer": str(folder), "paths": tmp_path / "*.txt", "val_fraction": val_fraction}
    settings["cache_dir"] = tmp_path / "cache"  # of which neither may be taken for the other
    plain, begun = (TextDataModule(sequence_length=8, add_bos=add, **settings) for add in (False, True))
    for data in (plain, begun):
        data.setup()
    for name in ("train_set", "val_set"):
        old, new = getattr(plain, name), getattr(begun, name)
        if old is None:
            continue
        documents = np.split(old.stream.tokens, old.stream.starts[1:])
        assert np.array_equal(new.stream.tokens, np.concatenate([[0, *document] for document in documents]))
        assert np.array_equal(np.diff(new.stream.starts), np.diff(old.stream.starts) + 1)
    assert plain.identity()["content"] != begun.identity()["content"]


def test_a_document_that_comes_in_parts_has_one_begin_token():
    builder = StreamBuilder(vocab_size=300, eos_id=1, bos_id=0)
    for ids, ends in (([5, 6], False), ([7], False), ([], True), ([8], True)):
        builder.add("a", ids, ends=ends)
    assert builder.build().tokens.tolist() == [0, 5, 6, 7, 1, 0, 8, 1]


@pytest.mark.parametrize("seed", [0, 3])  # the lone document falls on either side
def test_both_parts_of_a_lone_document_begin_with_one_begin_token(folder, tmp_path, seed):
    (tmp_path / "a.txt").write_text("train the model " * 40)
    settings = {"source": "text", "tokenizer": str(folder), "paths": tmp_path / "a.txt", "val_fraction": 0.5}
    data = TextDataModule(sequence_length=8, add_bos=True, seed=seed, **settings)
    data.setup()
    parts = [side.stream.tokens.tolist() for side in (data.train_set, data.val_set)]
    assert [(part[0], part.count(0), part[-1], part.count(1)) for part in parts] == [(0, 1, 1, 1)] * 2
    assert data.tokenizer.decode([*parts[0], *parts[1]]) == "train the model " * 40


def test_few_documents_leave_one_to_validate_on_with_one_begin_token(folder, tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("train the model " * 9)
    settings = {"source": "text", "tokenizer": str(folder), "paths": tmp_path, "val_fraction": 0.001}
    data = TextDataModule(sequence_length=8, add_bos=True, **settings)
    data.setup()
    assert [data.train_set.stream.tokens.tolist().count(0), data.val_set.stream.tokens.tolist().count(0)] == [1, 1]


def test_a_begin_token_that_there_is_not_is_refused(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path))
    tokenizer.bos_id = None
    with pytest.raises(DataError, match=r"data\.add_bos=true, but the tokenizer .* names no begin token"):
        TextDataModule(tokenizer=tokenizer, add_bos=True)


def test_the_documented_way_of_adding_tokens_keeps_the_old_rows(folder, tmp_path):
    import re
    from pathlib import Path

    import torch
    from transformers import AutoModelForCausalLM

    from lightning_npu_tp.tools.testing.models import tiny_config

    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    code = re.search(r"## Adding tokens.*?```python\n(.*?)```", page, re.DOTALL)[1]
    torch.manual_seed(0)
    config = tiny_config("llama")
    config.vocab_size = load_tokenizer(folder).vocab_size
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "old")
    shutil.copytree(folder, tmp_path / "old", dirs_exist_ok=True)
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    exec(code.replace('"FOLDER"', repr(old)).replace('"NEW"', repr(new)), {})
    tokenizer = load_tokenizer(new)
    assert len(tokenizer.encode("a<|tool|>b<|result|>")) == 4
    assert tokenizer.decode(tokenizer.encode(CHINESE)) == CHINESE
    grown = AutoModelForCausalLM.from_pretrained(new)
    check_vocabulary(tokenizer, grown.config.vocab_size)
    assert grown.config.vocab_size == config.vocab_size + 2
    kept = grown.get_input_embeddings().weight[: config.vocab_size]
    assert torch.equal(kept, model.get_input_embeddings().weight)


def otherwise_split(folder):
    """Byte-level files whose splitter is nobody's but theirs, as DeepSeek's is."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    own = pre_tokenizers.Split(Regex(r"[\r\n]|\s?\p{L}+"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [own, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    bpe.train_from_iterator([CHINESE * 5, "if n < 2:\n    return  12345, x [0]\n" * 20], trainer)
    bpe.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"tokenizer_class": "LlamaTokenizerFast", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}, "LlamaTokenizer"),
        ({"tokenizer_class": "Qwen2Tokenizer"}, "Qwen2Tokenizer"),
    ],
)
def test_a_class_that_encodes_otherwise_than_the_file_is_an_error_that_names_it(tmp_path, config, name):
    from lightning_npu_tp.tools.check_folder import read_tokenizer

    otherwise_split(tmp_path)
    settings = {"eos_token": END, "clean_up_tokenization_spaces": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, **config}))
    with pytest.raises(DataError, match=rf"loads it as {name}.*Set tokenizer_class .*PreTrainedTokenizerFast") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    told = read_tokenizer(str(tmp_path), 400)
    assert told.fault and told.ids is None and f"loads it as {name}" in told.line
    # What the error says to do.
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**settings, **config, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(CHINESE)) == CHINESE
    assert not read_tokenizer(str(tmp_path), 400).fault


def test_files_that_are_no_tokenizer_give_one_kind_of_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(DataError, match="cannot be loaded as a Hugging Face tokenizer"):
            load_tokenizer(path)


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_sizes():
    check_vocabulary(ByteTokenizer(), 259)
    with pytest.raises(DataError, match=r"\(bytes, data\.tokenizer\) has 259 ids, .* \(model vocab_size\) has 258"):
        check_vocabulary(ByteTokenizer(), 258)


def test_chinese_documents_are_packed_with_a_hugging_face_tokenizer_and_come_back(folder, tmp_path):
    texts = [f"{CHINESE}{number}" for number in range(9)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = {"tokenizer": str(folder), "isolate_documents": True, "val_fraction": 0, "batch_size": 1}
    data = TextDataModule(source="text", paths=tmp_path, sequence_length=32, **settings)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert data.vocab_size == load_tokenizer(folder).vocab_size
    assert data.tokenizer.decode(data.train_set.stream.tokens) == "".join(texts)
