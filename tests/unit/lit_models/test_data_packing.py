"""Catches: a token lost, doubled or predicted twice where sequences or documents meet; labels shifted twice or not
at all; a document that sees its neighbour; padding that counts."""

from itertools import islice

import numpy as np
import pytest
import torch

from lightning_npu_tp.errors import DataError
from lit_models.data.packing import IGNORED, PackedDataset
from lit_models.data.streams import StreamBuilder, TokenStream

EOS, PAD = 90, 91
A, B, C, D, E = 1, 2, 3, 4, 5


def make_stream(documents, **limits) -> TokenStream:
    builder = StreamBuilder(vocab_size=limits.pop("vocab_size", 100), eos_id=EOS, **limits)
    for number, document in enumerate(documents):
        builder.add(str(number), document)
    return builder.build()


def pack(documents, **settings) -> PackedDataset:
    return PackedDataset(make_stream(documents), pad_id=PAD, **settings)


def rows(dataset: PackedDataset, key: str) -> list[list[int]]:
    return [dataset[index][key].tolist() for index in range(len(dataset))]


def unique_stream(lengths: list[int]) -> TokenStream:
    """Every token, eos included, is its own index: where a token went can be read off its value."""
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return TokenStream(tokens=np.arange(sum(lengths), dtype=np.int32), starts=starts)


def random_lengths(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, 14, size=count).tolist()


def test_the_hand_written_example_is_packed_as_the_module_says():
    dataset = pack([[A, B], [C, D, E]], sequence_length=4)
    assert rows(dataset, "input_ids") == [[A, B, EOS, C], [C, D, E, EOS]]
    assert rows(dataset, "labels") == [[IGNORED, B, EOS, C], [IGNORED, D, E, EOS]]
    assert set(dataset[0]) == {"input_ids", "labels"}
    assert all(value.dtype == torch.int64 for value in dataset[0].values())


def test_isolated_documents_restart_positions_and_do_not_predict_each_other():
    dataset = pack([[A, B], [C, D, E]], sequence_length=4, isolate_documents=True)
    assert rows(dataset, "input_ids") == [[A, B, EOS, C], [C, D, E, EOS]]
    assert rows(dataset, "labels") == [[IGNORED, B, EOS, IGNORED], [IGNORED, D, E, EOS]]
    assert rows(dataset, "position_ids") == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert dataset[0]["position_ids"].dtype == torch.int64


def test_a_document_that_begins_right_after_a_border_is_not_predicted_from_the_shared_eos():
    dataset = pack([[A, B], [C, D]], sequence_length=3, isolate_documents=True)  # a b . | . c d | d .
    assert rows(dataset, "labels") == [[IGNORED, B, EOS], [IGNORED, IGNORED, D], [IGNORED, EOS, IGNORED]]
    assert rows(dataset, "position_ids") == [[0, 1, 2], [0, 0, 1], [0, 1, 0]]


def test_padding_is_never_a_target_and_is_a_document_of_its_own():
    dataset = pack([[A, B, C]], sequence_length=6, isolate_documents=True)
    assert rows(dataset, "input_ids") == [[A, B, C, EOS, PAD, PAD]]
    assert rows(dataset, "labels") == [[IGNORED, B, C, EOS, IGNORED, IGNORED]]
    assert rows(dataset, "position_ids") == [[0, 1, 2, 3, 0, 1]]


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("last", ["pad", "drop"])
@pytest.mark.parametrize("size", [2, 3, 7, 64])
def test_every_token_is_kept_and_predicted_exactly_once(size, last, isolate):
    stream = unique_stream(random_lengths(seed=size, count=40))
    dataset = PackedDataset(stream, sequence_length=size, pad_id=-1, isolate_documents=isolate, last=last)
    kept = stream.num_tokens - dataset.num_dropped
    assert dataset.num_dropped == (0 if last == "pad" else (stream.num_tokens - 1) % (size - 1))

    inputs = rows(dataset, "input_ids")
    joined = inputs[0] + [token for row in inputs[1:] for token in row[1:]]
    assert joined[:kept] == list(range(kept))
    assert set(joined[kept:]) <= {-1}

    targets = [label for row in rows(dataset, "labels") for label in row if label != IGNORED]
    not_predicted = set(stream.starts.tolist()) if isolate else {0}
    assert targets == [token for token in range(kept) if token not in not_predicted]
    assert len(targets) == dataset.num_predicted
    if last == "pad":
        assert len(targets) == stream.num_tokens - len(not_predicted)


@pytest.mark.parametrize("size", [2, 5, 16])
def test_positions_count_from_the_later_of_document_and_sequence_start(size):
    lengths = random_lengths(seed=3, count=30)
    stream = unique_stream(lengths)
    dataset = PackedDataset(stream, sequence_length=size, pad_id=-1, isolate_documents=True, last="drop")
    start_of = np.repeat(stream.starts, lengths)
    for row in (dataset[index] for index in range(len(dataset))):
        tokens = row["input_ids"].numpy()
        assert row["position_ids"].tolist() == (tokens - np.maximum(start_of[tokens], tokens[0])).tolist()


def test_blank_sequences_even_out_batches_and_count_nothing():
    dataset = pack([[A, B, C], [D, E]], sequence_length=3, isolate_documents=True)
    rounded = dataset.round_up(4)
    assert (len(dataset), len(rounded), len(rounded.round_up(4))) == (3, 4, 4)
    assert [rounded[i]["input_ids"].tolist() for i in range(3)] == rows(dataset, "input_ids")
    blank = {key: value.tolist() for key, value in rounded[3].items()}
    nothing = {"labels": [IGNORED] * 3, "token_mask": [False] * 3}
    assert blank == {"input_ids": [PAD] * 3, "position_ids": [0, 1, 2], **nothing}
    assert rounded[0]["token_mask"].all() and "token_mask" not in pack([[A, B]], sequence_length=3)[0]
    half = pack([[A, B, C]], sequence_length=3)[1]
    assert half["token_mask"].tolist() == [True, True, False] == (half["input_ids"] != PAD).tolist()
    assert rounded.num_predicted == dataset.num_predicted


def test_iterating_ends_at_the_last_sequence():
    dataset = pack([[A, B, C], [D, E]], sequence_length=3)
    assert len(list(islice(dataset, 10))) == len(dataset) == 3  # a loop stops at IndexError alone
    with pytest.raises(IndexError):
        dataset[-1]


def test_limits_cut_the_last_document_so_that_it_still_ends_with_eos():
    stream = make_stream([[A, B], [C, D, E]], max_tokens=5)
    assert stream.tokens.tolist() == [A, B, EOS, C, EOS]
    assert stream.starts.tolist() == [0, 3]
    assert make_stream([[A, B], [C, D, E]], max_tokens=4).tokens.tolist() == [A, B, EOS]
    assert make_stream([[A], [B], [C]], max_documents=2).tokens.tolist() == [A, EOS, B, EOS]


def test_a_document_without_tokens_leaves_no_trace():
    builder = StreamBuilder(vocab_size=100, eos_id=EOS)
    assert [builder.add("a", [A]), builder.add("b", []), builder.add("c", [C])] == [True, False, True]
    assert builder.names == ["a", "c"]
    assert builder.build().tokens.tolist() == [A, EOS, C, EOS]


def test_a_document_that_is_taken_out_is_gone_from_names_counts_and_stream():
    builder = StreamBuilder(vocab_size=100, eos_id=EOS, max_tokens=6)
    builder.add("a", [A, B])
    builder.add("b", [C, D])
    name, ids = builder.pop(0)
    assert (name, ids.tolist(), builder.num_tokens, builder.names) == ("a", [A, B], 3, ["b"])
    builder.add("c", [E])
    assert builder.build().tokens.tolist() == [C, D, EOS, E, EOS]


@pytest.mark.parametrize(("vocab_size", "largest"), [(65536, 65535), (102400, 102399)])
def test_the_largest_id_of_a_vocabulary_survives_storage(vocab_size, largest):
    stream = make_stream([[largest, 0]], vocab_size=vocab_size)
    assert stream.tokens.tolist() == [largest, 0, EOS]
    assert stream.tokens.itemsize == (2 if vocab_size <= 65536 else 4)


def test_sets_that_give_no_sequence_are_refused():
    with pytest.raises(DataError, match=r"3 tokens in 1 documents .* data\.sequence_length=4\. .* to 3 or less"):
        pack([[A, B]], sequence_length=4, last="drop")
    assert len(pack([[A, B]], sequence_length=3, last="drop")) == 1
    with pytest.raises(DataError, match=r"0 tokens in 0 documents"):
        pack([], sequence_length=4)
    with pytest.raises(DataError, match=r"data\.sequence_length=1 .* 2 or more"):
        pack([[A, B]], sequence_length=1)
    with pytest.raises(DataError, match=r"last='keep' must be 'pad' or 'drop'"):
        pack([[A, B]], sequence_length=2, last="keep")


@pytest.fixture(scope="module")
def tiny_deepseek():
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=2,
        n_routed_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
    )
    return DeepseekV2ForCausalLM(config).eval()


def test_transformers_loss_on_our_labels_is_the_once_shifted_loss(tiny_deepseek):
    item = pack([[A, B], [C, D, E, A]], sequence_length=8, isolate_documents=True)[0]
    batch = {key: value[None] for key, value in item.items()}
    with torch.no_grad():
        out = tiny_deepseek(**batch)
    log_probs = out.logits[0].log_softmax(-1)
    tokens = item["input_ids"].tolist()
    assert tokens == [A, B, EOS, C, D, E, A, EOS]
    predicted = [1, 2, 4, 5, 6, 7]  # not 0 and not 3: the documents' first tokens
    by_hand = -sum(log_probs[at - 1, tokens[at]] for at in predicted) / len(predicted)
    # float32 sums of six numbers near 4.6
    torch.testing.assert_close(out.loss, by_hand, rtol=1e-6, atol=0)


def test_transformers_attends_within_an_isolated_document_only(tiny_deepseek):
    isolated = pack([[A, B], [C, D, E, A]], sequence_length=8, isolate_documents=True)[0]
    with torch.no_grad():
        positions = isolated["position_ids"][None]
        # With a cache, which a call has by default, transformers takes no notice of restarts.
        packed = tiny_deepseek(input_ids=isolated["input_ids"][None], position_ids=positions, use_cache=False)
        alone = tiny_deepseek(input_ids=torch.tensor([[C, D, E, A, EOS]]))
        plain = tiny_deepseek(input_ids=isolated["input_ids"][None])
    # float32 attention over 5 keys against 8, three of them masked
    torch.testing.assert_close(packed.logits[:, 3:], alone.logits, rtol=1e-5, atol=1e-6)
    assert (plain.logits[:, 3:] - alone.logits).abs().max() > 1e-3  # it would see the neighbour without positions
