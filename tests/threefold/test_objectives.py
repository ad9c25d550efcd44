"""Objectives against plain autograd, a per-example loop, transformers and TRL."""

import copy

import pytest
import torch
import torch.nn.functional as F

from basics.errors import ConfigError
from threefold.config import ModelConfig
from threefold.data.packing import IGNORE, pack_documents, pack_examples, pack_pairs
from threefold.model.decoder import Decoder
from threefold.model.hf import from_transformers
from threefold.training import losses
from threefold.training.objectives import Distillation, MicroBatch, NextToken, Preference, reference_logprobs

EOS, SINK, VOCABULARY = 0, 1, 61
TINY = ModelConfig(n_layer=2, d_model=16, n_head=2, d_ff=24, context=32, vocab_size=VOCABULARY)


def model(seed: int, config: ModelConfig = TINY, std: float = 0.2) -> Decoder:
    """A decoder whose weights are all random and large enough that no part of it is idle."""
    decoder = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    decoder.initialise(generator)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return decoder


def ids(generator: torch.Generator, low: int, high: int) -> list[int]:
    length = int(torch.randint(low, high, (1,), generator=generator))
    return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def examples(generator):
    return [(ids(generator, 1, 9), ids(generator, 1, 12)) for _ in range(13)]


@pytest.fixture
def pairs(generator):
    return [(ids(generator, 1, 7), ids(generator, 1, 9), ids(generator, 1, 14)) for _ in range(6)]


# Losses at the head -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 5 * 7, 1 << 20])
def test_cross_entropy_in_pieces_equals_torch(generator, monkeypatch, piece):
    monkeypatch.setitem(losses.PIECE, "cpu", piece)
    h = torch.randn(23, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (23,), generator=generator)
    expected = F.cross_entropy(h @ weight.T, targets, reduction="sum")
    gradients = torch.autograd.grad(expected * 0.3, (h, weight))
    loss = losses.cross_entropy_sum(h, weight, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss * 0.3, (h, weight)), gradients)
    with torch.no_grad():
        torch.testing.assert_close(losses.cross_entropy_sum(h, weight, targets), expected)


def test_distillation_in_pieces_equals_autograd(generator, monkeypatch):
    monkeypatch.setitem(losses.PIECE, "cpu", 5 * 7)
    h = torch.randn(23, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher_h, teacher_weight = torch.randn(23, 6, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    targets = torch.randint(0, 7, (23,), generator=generator)
    temperature, share = 3.0, 0.7
    soft = F.kl_div(
        F.log_softmax(h @ weight.T / temperature, 1),
        F.softmax(teacher_h @ teacher_weight.T / temperature, 1),
        reduction="sum",
    )
    hard = F.cross_entropy(h @ weight.T, targets, reduction="sum")
    expected = share * temperature**2 * soft + (1 - share) * hard
    found = losses.distillation_sums(h, weight, targets, teacher_h, teacher_weight, temperature, share)
    torch.testing.assert_close(found, (expected, soft, hard))
    torch.testing.assert_close(torch.autograd.grad(found[0], (h, weight)), torch.autograd.grad(expected, (h, weight)))


@pytest.mark.parametrize("name", ["cross entropy", "distillation", "target log-probabilities"])
def test_a_padded_vocabulary_changes_no_loss_and_no_gradient(generator, monkeypatch, name):
    """7 tokens as 64 in the products. The true weights, as they are saved, get the gradients; no token beside them gets
    any probability."""
    h, teacher_h = (torch.randn(23, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, teacher = (100 * torch.randn(7, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(0, 7, (23,), generator=generator)
    h.requires_grad_()
    weight.requires_grad_()
    compute = {
        "cross entropy": lambda: (losses.cross_entropy_sum(h, weight, targets),),
        "distillation": lambda: losses.distillation_sums(h, weight, targets, teacher_h, teacher, 2.0, 0.4),
        "target log-probabilities": lambda: (losses.target_logprobs(h, weight, targets).square().sum(),),
    }[name]
    expected = compute()
    expected_gradients = torch.autograd.grad(expected[0], (h, weight))
    monkeypatch.setitem(losses.MULTIPLE, "cpu", 64)
    monkeypatch.setitem(losses.PIECE, "cpu", 5 * 64)
    shapes = []
    linear, mm = F.linear, torch.mm
    monkeypatch.setattr(F, "linear", lambda *a, **k: shapes.append(linear(*a, **k).shape) or linear(*a, **k))
    monkeypatch.setattr(torch, "mm", lambda *a, **k: shapes.append(mm(*a, **k).shape) or mm(*a, **k))
    found = compute()
    assert any(shape[1] == 64 for shape in shapes)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found[0], (h, weight))
    assert gradients[1].shape == weight.shape
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["cross entropy", "distillation", "target log-probabilities"])
def test_a_compiled_loss_is_the_loss_in_one_graph_for_every_number_of_targets(generator, monkeypatch, name, dtype):
    """What a GPU runs, by the CPU's compiler: the same values within rounding."""
    monkeypatch.setattr(losses, "FUSED", {"cpu"})
    monkeypatch.setitem(losses.MULTIPLE, "cpu", 64)
    monkeypatch.setitem(losses.PIECE, "cpu", 16 * 128)
    teacher_h, teacher = (torch.randn(n, 8, generator=generator).to(dtype) for n in (64, 101))
    weight = torch.randn(101, 8, generator=generator).requires_grad_()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for n in (23, 37, 64):  # pieces of 16, and a last one of 7, 5 and 16
        h = torch.randn(n, 8, generator=generator, requires_grad=True)
        targets = torch.randint(0, 101, (n,), generator=generator)
        found, gradients = [], []
        for compiled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                if name == "cross entropy":
                    values = (losses.cross_entropy_sum(h, weight, targets, compiled=compiled),)
                elif name == "distillation":
                    sizes = teacher_h[:n], teacher, 2.0, 0.4
                    values = losses.distillation_sums(h, weight, targets, *sizes, compiled=compiled)
                else:
                    values = (losses.target_logprobs(h, weight, targets, compiled=compiled).square().sum(),)
            found.append(values)
            gradients.append(torch.autograd.grad(values[0], (h, weight)))
        rough = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(found[1], found[0])
        torch.testing.assert_close(gradients[1], gradients[0], **rough)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_cross_entropy_under_bf16_autocast_is_near_fp32(generator):
    h = torch.randn(64, 32, generator=generator, requires_grad=True)
    weight = (0.1 * torch.randn(50, 32, generator=generator)).requires_grad_()
    targets = torch.randint(0, 50, (64,), generator=generator)
    exact = losses.cross_entropy_sum(h, weight, targets)
    gradients = torch.autograd.grad(exact, (h, weight))
    with torch.autocast("cpu", torch.bfloat16):
        rough = losses.cross_entropy_sum(h, weight, targets)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=2e-3, atol=0)
    for found, expected in zip(torch.autograd.grad(rough, (h, weight)), gradients, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.01 * expected.norm()


# Next token ---------------------------------------------------------------------------------------------------------


def test_sft_learns_the_response_and_its_end_and_nothing_else(examples):
    """Packed rows against one example at a time, written out: sinks and prompt in, response and EOS out."""
    decoder = model(1)
    total, count = 0.0, 0
    for prompt, response in examples:
        inputs = [SINK, *prompt, *response]
        logprobs = decoder(torch.tensor([inputs]))[0].log_softmax(-1)
        wanted = [*response, EOS]
        first = len(inputs) - len(wanted)  # the position of the prompt's last token
        for place, token in enumerate(wanted):
            total = total - logprobs[first + place, token]
            count += 1
    total.backward()
    expected = {name: p.grad.clone() for name, p in decoder.named_parameters()}
    decoder.zero_grad()

    rows = pack_examples(examples, TINY, EOS, [SINK])
    batch = rows.rows(range(len(rows)))
    assert len(rows) < len(examples) and (batch.targets_BT == IGNORE).any()
    loss = NextToken()(decoder, batch)
    assert loss.weight == count
    torch.testing.assert_close(loss.sum, total, rtol=1e-5, atol=0)
    loss.sum.backward()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_sft_loss_equals_trl_with_completion_only_loss(examples, tmp_path):
    from datasets import Dataset
    from transformers import LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    def text(tokens):
        return " ".join(f"w{token:02d}" for token in tokens)

    llama = LlamaForCausalLM(llama_config()).eval()
    data = [{"prompt": text([SINK, *p]), "completion": " " + text(r)} for p, r in examples]
    arguments = SFTConfig(completion_only_loss=True, **trl_settings(tmp_path))
    trainer = SFTTrainer(llama, arguments, train_dataset=Dataset.from_list(data), processing_class=trl_tokenizer())
    inputs = trainer.data_collator(list(trainer.train_dataset))
    assert inputs["input_ids"][0, : inputs["attention_mask"][0].sum()].tolist() == [
        SINK,
        *examples[0][0],
        *examples[0][1],
        EOS,
    ]
    expected = llama(**inputs).loss
    rows = pack_examples(examples, TINY, EOS, [SINK])
    loss = NextToken()(from_transformers(llama), rows.rows(range(len(rows))))
    torch.testing.assert_close(loss.sum / loss.weight, expected, rtol=1e-5, atol=0)


def test_what_stands_at_ignored_positions_does_not_matter(examples):
    decoder = model(1)
    batch = pack_examples(examples, TINY, EOS, [SINK]).rows([0, 1])
    loss = NextToken()(decoder, batch).sum
    padding = batch.segments_BT < 0
    assert padding.any()
    batch.tokens_BT[padding] = 7
    torch.testing.assert_close(NextToken()(decoder, batch).sum, loss)


def test_micro_batches_count_neither_padding_nor_sinks(generator):
    documents = [ids(generator, 3, 20) for _ in range(5)]
    rows = pack_documents(documents, TINY, EOS, [SINK])
    batch = MicroBatch.of(rows.rows(range(len(rows))))
    assert batch.tokens == sum(map(len, documents)) == rows.n_tokens
    assert batch.padding == rows.n_padding


# Preferences --------------------------------------------------------------------------------------------------------


def llama_config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=SINK,
        eos_token_id=EOS,
        pad_token_id=EOS,
        rms_norm_eps=TINY.norm_eps,
    )


def trl_tokenizer():
    """Words w00, w01, ... that stand for their numbers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i:02d}": i for i in range(VOCABULARY)}, unk_token="w02"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w00", pad_token="w00", bos_token="w01")


def trl_settings(folder) -> dict:
    return {"output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False, "fp16": False}


def test_dpo_loss_gradients_and_rewards_equal_trl(pairs, tmp_path):
    from datasets import Dataset
    from transformers import LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    beta = 0.3
    torch.manual_seed(3)
    policy, reference = LlamaForCausalLM(llama_config()), LlamaForCausalLM(llama_config())
    ours, our_reference = from_transformers(policy), from_transformers(reference)

    unused = Dataset.from_list([{"prompt": "w03", "chosen": "w04", "rejected": "w05"}])  # the trainer wants some data
    trainer = DPOTrainer(
        policy,
        reference,
        args=DPOConfig(beta=beta, **trl_settings(tmp_path)),
        train_dataset=unused,
        processing_class=trl_tokenizer(),
    )
    inputs = DataCollatorForPreference(pad_token_id=EOS)(
        [
            {"prompt_ids": [SINK, *prompt], "chosen_ids": [*chosen, EOS], "rejected_ids": [*rejected, EOS]}
            for prompt, chosen, rejected in pairs
        ]
    )
    expected = trainer.compute_loss(policy, inputs)
    expected.backward()

    rows = pack_pairs(pairs, TINY, EOS, [SINK])
    assert len(rows) == len(pairs)
    objective = Preference(beta, reference_logprobs(our_reference, rows, batch_size=4, device="cpu"))
    batch = next(rows.batches(len(pairs), shuffle=False))
    assert batch.tokens_BT.size(0) < 2 * len(pairs)  # packed
    loss = objective(ours, batch)
    assert loss.weight == len(pairs)
    torch.testing.assert_close(loss.sum / loss.weight, expected, rtol=1e-5, atol=1e-6)

    (loss.sum / loss.weight).backward()
    gradients = copy.deepcopy(policy)  # TRL's gradients, renamed as the weights are
    with torch.no_grad():
        for target, source in zip(gradients.parameters(), policy.parameters(), strict=True):
            target.copy_(source.grad)
    theirs = dict(from_transformers(gradients).named_parameters())
    largest = max(p.detach().abs().max().item() for p in theirs.values())
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, theirs[name].detach(), rtol=1e-3, atol=1e-5 * largest, msg=name)

    logged = trainer._metrics["train"]
    metrics = {key: value.item() / loss.weight for key, value in loss.metrics.items()}
    assert metrics["reward_margin"] == pytest.approx(logged["rewards/margins"][0], rel=1e-4)
    assert metrics["reward_accuracy"] == pytest.approx(logged["rewards/accuracies"][0])
    assert metrics["reward_chosen"] == pytest.approx(logged["rewards/chosen"][0], rel=1e-4)
    assert metrics["reward_rejected"] == pytest.approx(logged["rewards/rejected"][0], rel=1e-4)


def test_dpo_begins_at_ln_2_with_itself_as_reference(pairs):
    decoder = model(1)
    rows = pack_pairs(pairs, TINY, EOS, [SINK])
    objective = Preference(0.1, reference_logprobs(decoder, rows, batch_size=2, device="cpu"))
    loss = objective(decoder, next(rows.batches(6, shuffle=False)))
    torch.testing.assert_close(loss.sum / loss.weight, torch.tensor(2.0).log(), rtol=1e-5, atol=0)


def test_reference_logprobs_do_not_depend_on_the_batch(pairs):
    decoder = model(1)
    rows = pack_pairs(pairs, TINY, EOS, [SINK])
    alone = reference_logprobs(decoder, rows, batch_size=1, device="cpu")
    assert alone.shape == (6, 2)
    torch.testing.assert_close(reference_logprobs(decoder, rows, batch_size=6, device="cpu"), alone)
    prompt, chosen, _ = pairs[3]
    logprobs = decoder(torch.tensor([[SINK, *prompt, *chosen]]))[0].log_softmax(-1)
    wanted = torch.tensor([*chosen, EOS])
    expected = logprobs[-len(wanted) :].gather(1, wanted[:, None]).sum()
    torch.testing.assert_close(alone[3, 0], expected)


def test_preferences_refuse_what_cannot_be_meant(pairs):
    with pytest.raises(ConfigError, match="beta = 0"):
        Preference(0, torch.zeros(6, 2))
    with pytest.raises(ConfigError, match="held-out pairs"):
        Preference(0.1, torch.zeros(6, 2)).for_heldout()


# Distillation -------------------------------------------------------------------------------------------------------


def test_distillation_equals_its_formula_over_packed_rows(generator):
    student, teacher = model(1), model(2, ModelConfig(**{**vars(TINY), "n_layer": 3}))
    rows = pack_documents([ids(generator, 3, 40) for _ in range(6)], TINY, EOS, [SINK])
    batch = rows.rows(range(len(rows)))
    loss = Distillation(teacher, temperature=2.0, weight=0.25)(student, batch)
    used = batch.targets_BT != IGNORE
    arguments = batch.tokens_BT, batch.positions_BT, batch.segments_BT
    student_logits, teacher_logits = student(*arguments)[used], teacher(*arguments)[used]
    soft = F.kl_div((student_logits / 2).log_softmax(-1), (teacher_logits / 2).softmax(-1), reduction="sum")
    hard = F.cross_entropy(student_logits, batch.targets_BT[used], reduction="sum")
    torch.testing.assert_close(loss.sum, 0.25 * 4 * soft + 0.75 * hard, rtol=1e-5, atol=0)
    assert loss.metrics["kl"].item() == pytest.approx(soft.item(), rel=1e-4)
    loss.sum.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_teaches_itself_nothing(generator):
    teacher = model(1)
    student = model(1)
    rows = pack_documents([ids(generator, 3, 40) for _ in range(6)], TINY, EOS, [SINK])
    loss = Distillation(teacher, temperature=2.0, weight=1.0)(student, rows.rows([0, 1]))
    assert loss.sum.item() == pytest.approx(0, abs=1e-3)
    loss.sum.backward()
    assert max(p.grad.abs().max().item() for p in student.parameters()) < 1e-3


def test_distillation_refuses_another_vocabulary(generator):
    teacher = model(1, ModelConfig(**{**vars(TINY), "vocab_size": 70}))
    rows = pack_documents([ids(generator, 3, 40)], TINY, EOS, [SINK])
    with pytest.raises(ConfigError, match="same tokenizer"):
        Distillation(teacher)(model(2), rows.rows([0]))
