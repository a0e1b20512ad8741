"""Catches: loss on what the user says, on padding or on the prompt; an answer that is not learnt; a sample that is cut
where it fits or sees its neighbour; samples left out without a word; bad lines that fail without their number."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from lightning_npu_tp.errors import DataError
from lit_models.data import ChatDataModule, load_tokenizer
from lit_models.data.rendering import kept
from lit_models.data.samples import SampleDataset, pack_samples
from lit_models.data.show import spell
from lit_models.data.streams import StreamBuilder

END = "<|end|>"
PLAIN = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ 'Assistant: ' + message.content + eos_token }}"
    "{% elif message.role == 'user' %}{{ 'User: ' + message.content + '\n\n' }}"
    "{% elif message.role == 'system' %}{{ message.content + '\n\n' }}"
    "{% else %}{{ raise_exception('no ' + message.role + ' here') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '[' + message.role + '] ' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
# Drops what is thought in all turns but the last, as reasoning models' templates do.
FORGETFUL = (
    "{% for message in messages %}{% if message.role == 'assistant' and not loop.last %}{{ '!' }}"
    "{{ message.content.split('/')[-1] }}{% else %}{{ message.role[0] + ':' + message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def renderer():
    """One process renders for all tests of this file."""
    with kept():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["User: hello there\n\nAssistant: good morning to you"] * 5, trainer)
    place = tmp_path_factory.mktemp("chat") / "tokenizer"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(place)
    return place


def chat(*turns, **flags):
    """user, assistant, user, …; `flags` of the last turn."""
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]
    messages[-1].update(flags)
    return {"messages": messages}


def write(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def module(path, tokenizer, **settings):
    defaults = {"sequence_length": 128, "val_fraction": 0, "shuffle": False}
    return ChatDataModule(paths=path, tokenizer=tokenizer, **{**defaults, **settings})


def learnt(data, index=0):
    """The text of the labels that count, a string per run of them."""
    item = data.train_set[index]
    runs, previous = [], -2
    for at, label in enumerate(item["labels"].tolist()):
        if label == -100:
            continue
        assert label == item["input_ids"][at]
        if at != previous + 1:
            runs.append([])
        runs[-1].append(label)
        previous = at
    return [data.tokenizer.transformers.decode(run) for run in runs]


# What is learnt


@pytest.mark.parametrize("template", [None, MARKED])
def test_only_what_the_assistant_says_is_learnt_with_its_end(tmp_path, folder, template):
    path = write(tmp_path / "a.jsonl", chat("你好 hello", "good morning 早上好 🙂", "and now?", "nothing more"))
    data = module(path, folder, chat_template=template)
    data.setup()
    # A space that the first token takes along is learnt, whether it stands in the answer or ends the prompt.
    assert [text.strip() for text in learnt(data)] == [f"good morning 早上好 🙂{END}", f"nothing more{END}"]
    text = data.tokenizer.transformers.decode(data.train_set.stream.tokens.tolist())
    assert text.startswith("[user] 你好" if template else "User: 你好")
    assert ("marked by the template" if template else "found in the rendered text") in data.summary()


def test_sources_with_weights_are_conversations_too(tmp_path, folder):
    paths = [write(tmp_path / f"{name}.jsonl", *[chat("hi", name)] * 6) for name in ("yes", "no")]
    settings = {"tokenizer": folder, "sequence_length": 64, "pack": False, "val_fraction": 0}
    data = ChatDataModule(sources=[{"path": paths[0], "weight": 2}, paths[1]], **settings)
    dataset = data.train_dataloader().sampler
    assert dataset.size == 18 and sum(index < 6 for index in dataset) == 12
    assert data.summary().count("conversations read as") == 2


@pytest.mark.parametrize("template", [None, MARKED])
@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}])
def test_a_turn_can_be_left_out(tmp_path, folder, template, flag):
    record = chat("a", "first", "b", "second", **flag)
    data = module(write(tmp_path / "a.jsonl", record), folder, chat_template=template)
    data.setup()
    assert [text.strip() for text in learnt(data)] == [f"first{END}"]
    last = module(write(tmp_path / "a.jsonl", chat("a", "first", "b", "second")), folder, train_on="last")
    last.setup()
    assert learnt(last) == [f" second{END}"]


def test_the_tokens_are_those_of_transformers_own_template_call(tmp_path, folder):
    record = chat("hello there", "good morning", "你好", "早上好")
    data = module(write(tmp_path / "a.jsonl", record), folder)
    data.setup()
    inner = load_tokenizer(folder).transformers
    assert data.train_set.stream.tokens.tolist() == inner.apply_chat_template(record["messages"])["input_ids"]
    marked = module(tmp_path / "a.jsonl", folder, chat_template=MARKED)
    marked.setup()
    theirs = inner.apply_chat_template(
        record["messages"], chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    assert marked.train_set.stream.learn.tolist() == theirs["assistant_masks"]


def test_turns_that_a_template_rewrites_later_are_learnt_as_they_are_to_be_written(tmp_path, folder):
    records = chat("a", "x/y"), chat("a", "think/say", "b", "muse/speak")
    data = module(write(tmp_path / "a.jsonl", *records), folder, chat_template=FORGETFUL, pack=False)
    data.setup()
    texts = [spell(data.tokenizer, item["input_ids"][item["token_mask"]].tolist()) for item in data.train_set]
    assert texts == ["u:aa:x/y", "u:aa:think/say", "u:a!sayu:ba:muse/speak"]
    assert [learnt(data, n) for n in range(3)] == [["x/y"], ["think/say"], ["muse/speak"]]
    assert "1 conversations learnt in several samples, each as far as its last turn: a.jsonl:2" in data.summary()
    last = module(tmp_path / "a.jsonl", folder, chat_template=FORGETFUL, train_on="last", pack=False)
    last.setup()
    assert len(last.train_set) == 2 and learnt(last, 1) == ["muse/speak"]


def test_the_first_token_of_a_sample_is_never_learnt(tmp_path, folder):
    """What stands before it in a packed sequence is another sample."""
    bare = (
        "{% for message in messages %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% endfor %}"
    )
    records = [{"messages": [{"role": "assistant", "content": text}]} for text in ("welcome", "good morning")]
    data = module(write(tmp_path / "a.jsonl", *records), folder, chat_template=bare)
    data.setup()
    stream = data.train_set.stream
    assert data.tokenizer.transformers.decode(stream.tokens.tolist()) == f"welcome{END}good morning{END}"
    firsts = np.isin(np.arange(len(stream.tokens)), stream.starts)
    assert firsts.sum() == 2 and (stream.learn == ~firsts).all()


# Formats


def test_from_value_files_and_parquet_give_the_same_samples(tmp_path, folder):
    messages = chat("hello", "good morning")["messages"]
    turns = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in messages]
    plain = module(write(tmp_path / "a.jsonl", {"messages": messages}), folder)
    keys = {"messages_key": "conversations", "role_key": "from", "content_key": "value"}
    shared = module(write(tmp_path / "b.jsonl", {"conversations": turns}), folder, **keys)
    parquet.write_table(
        pa.Table.from_pylist([{"messages": [*messages, {"role": "user", "content": "x", "weight": 1}]}]),
        tmp_path / "c.parquet",
    )
    rows = module(tmp_path / "c.parquet", folder)
    for data in (plain, shared, rows):
        data.setup()
        assert learnt(data) == [f" good morning{END}"]
    assert np.array_equal(plain.train_set.stream.tokens, shared.train_set.stream.tokens)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', r"a\.jsonl' line 2 is not JSON"),
        ('{"messages": []}', r"line 2: 'messages' is empty"),
        ('{"messages": "hi"}', r"line 2: 'messages' is not a list"),
        ('{"turns": []}', r"line 2 is no conversation.*its keys are \['turns'\].*Set data\.messages_key"),
        ('{"messages": ["hi"]}', r"line 2, message 1 is str, not an object"),
        ('{"messages": [{"who": "human", "value": "x"}]}', r"message 1 has no 'role'.*Set data\.role_key"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', r"unknown role 'bot'.*data\.role_names=\{bot: ROLE\}"),
        ('{"messages": [{"role": "user", "content": 3}]}', r"message 1: 'content' holds int, not text"),
        ('{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}', r"weight=0\.5.* 0 or 1"),
        (
            '{"messages": [{"role": "tool", "content": "x"}]}',
            r"line 2: the chat template of .* refuses the sample: no tool here",
        ),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_its_repair(tmp_path, folder, line, message):
    path = write(tmp_path / "a.jsonl", chat("hello", "good morning"))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        module(path, folder).setup()


def test_settings_that_cannot_work_are_refused(tmp_path, folder):
    path = write(tmp_path / "a.jsonl", chat("hello", "good morning"))
    for settings, message in (
        ({"tokenizer": None}, r"needs a Hugging Face tokenizer, but data\.tokenizer is bytes"),
        ({"chat_template": "nowhere.jinja"}, r"chat_template='nowhere\.jinja' is neither a file nor a template"),
        ({"train_on": "none"}, r"data\.train_on='none' is unknown"),
        ({"too_long": "split"}, r"data\.too_long='split' is unknown"),
    ):
        with pytest.raises(DataError, match=message):
            module(path, **{"tokenizer": folder, **settings})
    inner = load_tokenizer(folder)
    inner.transformers.chat_template = None
    with pytest.raises(DataError, match=r"has no chat template\. Set data\.chat_template"):
        module(path, inner)
    (tmp_path / "mine.jinja").write_text(PLAIN)
    assert module(path, inner, chat_template=str(tmp_path / "mine.jinja")).template.template == PLAIN
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a\.txt', but data=chat reads \.jsonl, \.json"):
        module(tmp_path / "a.txt", folder).setup()


# What is left out


def test_samples_with_nothing_to_learn_from_are_counted_and_named(tmp_path, folder):
    nothing = [chat("only a question"), chat("a", "b", train=False)]
    data = module(write(tmp_path / "a.jsonl", nothing[0], chat("a", "b"), nothing[1]), folder)
    assert "skipped: 2 samples with nothing to learn from: a.jsonl:1, a.jsonl:3" in data.summary()
    assert data.train_set.stream.num_documents == 1
    with pytest.raises(DataError, match=r"no conversation to train on \(1 samples with nothing .*b\.jsonl:1"):
        module(write(tmp_path / "b.jsonl", nothing[0]), folder).setup()


def test_long_samples_are_dropped_or_cut_and_counted(tmp_path, folder):
    path = write(tmp_path / "a.jsonl", chat("a", "b"), chat("a", "long " * 100), chat("long " * 100, "b"))
    data = module(path, folder)
    assert "2 samples with more than data.sequence_length=128 tokens: a.jsonl:2, a.jsonl:3" in data.summary()
    cut = module(path, folder, too_long="truncate", pack=False)
    summary = cut.summary()
    assert "1 samples cut to data.sequence_length=128 tokens: a.jsonl:2" in summary
    assert "1 samples with nothing to learn from in their first 128 tokens: a.jsonl:3" in summary
    assert (cut.train_set[1]["input_ids"] == cut.tokenizer.pad_id).sum() == 0
    assert cut.train_set.stream.num_documents == 2


# Packing


def sample_set(lengths, size, **settings):
    builder = StreamBuilder(vocab_size=70000, eos_id=None, learn=True)
    for number, length in enumerate(lengths):
        marks = np.arange(length) % 2
        builder.add(str(number), 1000 * (number + 1) + np.arange(length), learn=marks)
    return SampleDataset(builder.build(), sequence_length=size, pad_id=0, **settings)


@pytest.mark.parametrize("pack", [True, False])
def test_every_sample_is_whole_in_exactly_one_sequence_with_positions_of_its_own(pack):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 33, size=60)
    data = sample_set(lengths, 32, pack=pack)
    found, predicted = [], 0
    for item in (data[index] for index in range(len(data))):
        inputs, labels, positions = (item[name].numpy() for name in ("input_ids", "labels", "position_ids"))
        assert item["token_mask"].dtype == torch.bool
        assert item["token_mask"].tolist() == (inputs != 0).tolist(), "0 pads, and no sample has it"
        starts = [*np.flatnonzero(positions == 0).tolist(), 32]
        for begin, end in zip(starts, starts[1:], strict=False):
            assert positions[begin:end].tolist() == list(range(end - begin))
            if inputs[begin] == 0:
                assert not inputs[begin:end].any() and (labels[begin:end] == -100).all()
                continue
            number = inputs[begin] // 1000 - 1
            found.append(number)
            assert inputs[begin:end].tolist() == (1000 * (number + 1) + np.arange(lengths[number])).tolist()
            odd = np.arange(end - begin) % 2 == 1
            assert (labels[begin:end][odd] == inputs[begin:end][odd]).all() and (labels[begin:end][~odd] == -100).all()
            predicted += int(odd.sum())
    assert sorted(found) == list(range(60))
    assert predicted == data.num_predicted
    # Best fit, longest first, needs at most a fifth more than the tokens alone would (11/9 of the best).
    assert len(data) <= (-(-lengths.sum() // 32) * 11 / 9 + 1 if pack else 60)


def test_the_hand_written_example_is_packed_as_the_module_says():
    samples, begins = pack_samples(np.array([3, 4, 2]), 7)
    assert (samples.tolist(), begins.tolist()) == ([0, 1, 2], [0, 2])
    assert pack_samples(np.array([5, 5, 2, 2, 3]), 7)[1].tolist() == [0, 2, 4]
    assert len(sample_set([3, 2], 7).round_up(4)) == 4
    blank = sample_set([3, 2], 7).round_up(2)[1]
    assert (blank["labels"] == -100).all() and (blank["input_ids"] == 0).all()


def test_a_cached_chat_is_the_same_as_one_in_memory(tmp_path, folder):
    records = [chat(f"question {number}", "answer " * (number % 7 + 1)) for number in range(40)]
    path = write(tmp_path / "a.jsonl", *records, chat("only a question"))
    settings = {"val_fraction": 0.2, "batch_size": 2}
    memory = module(path, folder, **settings)
    for _ in range(2):  # built, then opened
        cached = module(path, folder, cache_dir=tmp_path / "cache", **settings)
        assert cached.identity() == memory.identity()
        for ours, theirs in zip(cached.train_dataloader(), memory.train_dataloader(), strict=True):
            assert all(ours[name].equal(theirs[name]) for name in theirs)
        assert "1 samples with nothing to learn from: a.jsonl:41" in cached.summary()
    assert cached.val_set.num_predicted == memory.val_set.num_predicted > 0


def test_few_samples_leave_one_to_validate_on_and_a_lone_one_none(tmp_path, folder):
    data = module(write(tmp_path / "a.jsonl", chat("a", "b"), chat("c", "d")), folder, val_fraction=0.001)
    data.setup()
    assert (data.train_set.stream.num_documents, data.val_set.stream.num_documents) == (1, 1)
    with pytest.raises(DataError, match="No conversation is left to validate on"):
        module(write(tmp_path / "b.jsonl", chat("a", "b")), folder, val_fraction=0.001).setup()


def test_the_samples_of_one_conversation_stay_on_one_side(tmp_path, folder):
    twice = chat("a", "think/say", "b", "muse/speak")
    settings = {"chat_template": FORGETFUL, "val_fraction": 0.001}
    with pytest.raises(DataError, match="No conversation is left to validate on"):
        module(write(tmp_path / "a.jsonl", twice), folder, **settings).setup()
    other = chat("c", "mull/tell", "d", "ask/answer")
    data = module(write(tmp_path / "b.jsonl", twice, other), folder, **settings)
    data.setup()
    sides = [spell(data.tokenizer, side.stream.tokens.tolist()) for side in (data.train_set, data.val_set)]
    assert sorted(sides) == ["u:aa:think/sayu:a!sayu:ba:muse/speak", "u:ca:mull/tellu:c!tellu:da:ask/answer"]
