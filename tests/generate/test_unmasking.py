"""Check static and dynamic confidence: which positions a pass unmasks, and the text that results."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.attention.spans import make_spans
from bd3_scale.generate.unmasking import BlindRule, Dynamic, EntropyBound, SightedRule, Static, Threshold
from bd3_scale.model.build import build_model
from bd3_scale.recipe.schema import ModelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.registry import unmasking_rules
from tests.generate.sampling import generate

MASK = 1
VOCABULARY = Vocabulary(size=12, eos_id=0, mask_id=MASK)
K = 4
PROMPTS = [[2, 9, 4, 7, 3, 5, 8, 6, 11, 10][:length] for length in (0, 3, 4, 5, 6, 7, 10)]


@pytest.fixture(scope="module")
def model(groups):
    shape = ModelRecipe(
        num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=16, init_std=0.7, head_bias=True
    )
    (built,) = build_model(shape, VOCABULARY, groups, dtype=torch.float32, device=torch.device("cpu"), seed=4)
    built.requires_grad_(False)
    built.output_layer.bias[VOCABULARY.eos_id] = -30.0  # no text ends by chance
    return built


@pytest.fixture
def shown(model, monkeypatch):
    """Return the blocks that denoising passes give the model, in order."""
    blocks = []
    decode = model.decode

    def observed(block, positions, cache, wanted):
        blocks.append(block[0].tolist())
        return decode(block, positions, cache, wanted)

    monkeypatch.setattr(model, "decode", observed)
    return blocks


@st.composite
def unmaskings(draw):
    """Draw block size, number of passes, masked positions, and a seed for the model's output."""
    block_size = draw(st.integers(1, 12))
    steps = draw(st.integers(1, block_size))
    masked = draw(st.lists(st.booleans(), min_size=block_size, max_size=block_size))
    return block_size, steps, torch.tensor(masked), draw(st.integers(0, 2**32 - 1))


def taken(how, confidence, masked, step):
    """Return which positions of one block `choose` takes."""
    nothing = torch.zeros(1, len(masked))
    return how.choose(confidence[None], nothing, masked[None], torch.tensor([step]))[0]


def unmask(how, masked, seed):
    """Return what each pass unmasks under a random model; its coarse confidences often tie."""
    random = torch.Generator().manual_seed(seed)
    passes = []
    while masked.any():
        confidence = torch.randint(0, 9, masked.shape, generator=random) / 8
        chosen = taken(how, confidence, masked, len(passes))
        passes.append((confidence, masked, chosen))
        masked = masked & ~chosen
    return passes


def passes_allowed(block_size, steps, masked):
    """Return how many passes fill `masked` positions; the larger passes come first."""
    left, passes = masked, 0
    while left > 0:
        left -= block_size // steps + (passes < block_size % steps)
        passes += 1
    return passes


@settings(deadline=None)
@given(unmaskings())
def test_static_takes_a_fixed_number_of_the_most_confident(case):
    block_size, steps, masked, seed = case
    passes = unmask(Static(block_size, steps), masked, seed)
    assert len(passes) == passes_allowed(block_size, steps, int(masked.sum())) <= steps
    if masked.all():
        assert len(passes) == steps
    for step, (confidence, before, chosen) in enumerate(passes):
        left = before.nonzero()[:, 0].tolist()
        size = block_size // steps + (step < block_size % steps)
        ranked = sorted(left, key=lambda place: (-confidence[place], place))
        assert sorted(ranked[:size]) == chosen.nonzero()[:, 0].tolist()


@settings(deadline=None)
@given(unmaskings(), st.floats(0, 1, exclude_min=True))
def test_dynamic_takes_all_above_the_threshold_and_no_fewer_than_static(case, threshold):
    block_size, steps, masked, seed = case
    passes = unmask(Dynamic(block_size, steps, threshold), masked, seed)
    static = Static(block_size, steps)
    assert len(passes) <= passes_allowed(block_size, steps, int(masked.sum()))
    for step, (confidence, before, chosen) in enumerate(passes):
        sure = before & (confidence > threshold)
        least = taken(static, confidence, before, step)
        assert not (chosen & ~before).any()
        assert chosen.sum() >= least.sum()
        assert torch.equal(chosen, sure if sure.sum() >= least.sum() else least)


@settings(deadline=None)
@given(unmaskings(), st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True))
def test_a_lower_threshold_takes_no_less(case, one, other):
    block_size, steps, masked, seed = case
    confidence = torch.rand(block_size, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        bold, careful = (
            taken(Dynamic(block_size, steps, threshold), confidence, masked, step) for threshold in sorted((one, other))
        )
        assert not (careful & ~bold).any()


@settings(deadline=None)
@given(st.integers(1, 64).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size))))
def test_passes_share_a_block_evenly_the_larger_first(case):
    block_size, steps = case
    passes = unmask(Static(block_size, steps), torch.ones(block_size, dtype=torch.bool), seed=1)
    counts = [int(chosen.sum()) for _, _, chosen in passes]
    assert (sum(counts), len(counts)) == (block_size, steps)
    assert counts[0] - counts[-1] <= 1
    assert counts == sorted(counts, reverse=True)


@settings(deadline=None)
@given(unmaskings(), st.floats(0, 3))
def test_entropy_takes_the_surest_while_all_but_the_last_stay_below_the_bound(case, bound):
    size, _, masked, seed = case
    entropy = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    how = EntropyBound(size, None, bound)
    chosen = how.choose(torch.zeros(1, size), entropy[None], masked[None], torch.tensor([0]))[0]
    places = sorted(masked.nonzero()[:, 0].tolist(), key=lambda place: float(entropy[place]))
    most = max((n for n in range(1, len(places) + 1) if sum(entropy[places[: n - 1]]) <= bound), default=0)
    assert chosen.nonzero()[:, 0].tolist() == sorted(places[:most])


def test_equally_confident_places_are_taken_from_the_left():
    masked = torch.tensor([False, True, True, True, False, True])
    how = Static(6, 3)
    assert taken(how, torch.full((6,), 0.5), masked, 0).tolist() == [False, True, True, False, False, False]


def test_a_confidence_at_the_threshold_does_not_exceed_it():
    how = Dynamic(4, 4, 0.5)
    confidence = torch.tensor([0.5, 0.5, 0.75, 0.5])
    assert taken(how, confidence, torch.ones(4, dtype=torch.bool), 0).tolist() == [False, False, True, False]


class Twin:
    """Greedy decoding without a cache: each pass runs the whole text and looks at one position after the other."""

    def __init__(self, model, prompt, max_new_tokens):
        self.model = model
        self.tokens = list(prompt)
        self.end = len(prompt) + max_new_tokens
        self.nfe = 0

    def candidates(self, block):
        """Return, for each masked position of the last block, its most likely token and that token's probability."""
        text = torch.tensor([self.tokens + block])
        spans = make_spans(torch.zeros_like(text, dtype=torch.int32), K)
        logits = self.model.clean_logits(text, torch.arange(text.shape[1])[None], spans)[0, len(self.tokens) :]
        self.nfe += 1
        found = {}
        for place, token in enumerate(block):
            if token == MASK:
                scores = logits[place].double().tolist()
                likeliest = max(range(len(scores)), key=lambda i: (scores[i], -i))
                found[place] = likeliest, float(logits[place].double().softmax(0)[likeliest])
        return found

    def run(self, steps, threshold):
        prompt = self.tokens
        self.tokens, block = prompt[: len(prompt) - len(prompt) % K], prompt[len(prompt) - len(prompt) % K :]
        while len(self.tokens) < self.end:
            block = block + [MASK] * (K - len(block))
            for step in range(steps):
                if MASK not in block:
                    break
                found = self.candidates(block)
                least = K // steps + (1 if step < K % steps else 0)
                take = sorted(found, key=lambda place: (-found[place][1], place))[:least]
                if threshold is not None:
                    sure = [place for place in found if found[place][1] > threshold]
                    take = sure if len(sure) >= least else take
                for place in take:
                    block[place] = found[place][0]
            assert MASK not in block
            self.tokens, block = self.tokens + block, []
        return self.tokens[len(prompt) : self.end], self.nfe


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize(
    ("steps", "threshold"), [(1, None), (2, None), (3, None), (4, None), (4, 0.4), (4, 0.7), (2, 0.4)]
)
def test_text_and_passes_are_those_of_a_plain_twin_without_a_cache(model, prompt, steps, threshold):
    rule = "static" if threshold is None else "dynamic"
    how = {"block_size": K, "max_new_tokens": 11, "temperature": 0}
    sample = generate(model, prompt, **how, unmasking=rule, steps=steps, threshold=threshold)
    assert (sample.tokens, sample.nfe) == Twin(model, prompt, 11).run(steps, threshold)


def test_the_twin_cases_tell_the_rules_apart(model):
    """Check that thresholds and steps change the number of passes, as the random model is confident only sometimes."""
    how = {"block_size": K, "max_new_tokens": 11, "temperature": 0}
    nfes = [
        sum(generate(model, prompt, **how, **options).nfe for prompt in PROMPTS)
        for options in (
            {"unmasking": "dynamic", "steps": 4, "threshold": 0.4},
            {"unmasking": "dynamic", "steps": 4, "threshold": 0.7},
            {"unmasking": "static", "steps": 4},
        )
    ]
    assert nfes[0] < nfes[1] < nfes[2]


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.lists(st.sampled_from(range(2, 12)), max_size=9),
    steps=st.integers(1, K),
    threshold=st.none() | st.floats(0, 1, exclude_min=True),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    seed=st.integers(0, 2**32),
)
def test_clean_tokens_stay_and_every_pass_has_its_share(model, prompt, steps, threshold, temperature, seed):
    shown = []
    decode = type(model).decode
    options = {"unmasking": "static" if threshold is None else "dynamic", "steps": steps, "threshold": threshold}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "decode", lambda *a: shown.append(a[0][0].tolist()) or decode(model, *a))
        how = {"block_size": K, "max_new_tokens": 9, "temperature": temperature, "seed": seed}
        sample = generate(model, prompt, **how, **options)
    assert len(sample.tokens) == 9
    assert not {MASK, VOCABULARY.eos_id} & set(sample.tokens)
    assert sample.nfe == len(shown)
    assert shown[0][: len(prompt) % K] == prompt[len(prompt) // K * K :]
    for before, after in itertools.pairwise(shown):
        kept = [a for a, b in zip(after, before, strict=True) if b != MASK]
        if kept == [b for b in before if b != MASK] and after.count(MASK) < before.count(MASK):
            assert before.count(MASK) - after.count(MASK) >= K // steps
        else:
            assert after == [MASK] * K  # the next block


@pytest.mark.parametrize(("steps", "passes"), [(1, [4, 4, 4]), (2, [4, 2] * 3), (3, [4, 2, 1] * 3)])
def test_several_tokens_a_pass(model, shown, steps, passes):
    sample = generate(model, [2, 3, 4, 5], block_size=K, max_new_tokens=12, unmasking="static", steps=steps)
    assert [block.count(MASK) for block in shown] == passes
    assert sample.nfe == len(passes)
    assert sample.cache_passes == 3
    assert len(sample.tokens) / sample.nfe > 1


def test_one_token_a_pass_by_default(model, shown):
    generate(model, [], block_size=K, max_new_tokens=4, unmasking="static")
    assert [block.count(MASK) for block in shown] == [4, 3, 2, 1]


def test_the_default_threshold_is_that_of_nine_in_ten(model):
    how = {"block_size": K, "max_new_tokens": 24, "temperature": 0.5, "unmasking": "dynamic"}
    assert generate(model, [2], **how) == generate(model, [2], **how, threshold=0.9)


@pytest.mark.parametrize("options", [{"unmasking": "static"}, {"unmasking": "dynamic", "threshold": 1e-9}])
def test_a_prompt_that_leaves_fewer_masks_than_a_pass_takes_stays(model, shown, monkeypatch, options):
    """Check that a pass that may take four masks, of which one is left, leaves the prompt unchanged in the cache."""
    finished = []
    prefill = model.prefill
    monkeypatch.setattr(
        model, "prefill", lambda block, *rest: finished.append(block[0].tolist()) or prefill(block, *rest)
    )
    sample = generate(model, [2, 3, 4], block_size=K, max_new_tokens=2, steps=1, temperature=0, **options)
    assert shown == [[2, 3, 4, MASK], [MASK] * 4]
    assert finished == [[2, 3, 4, sample.tokens[0]]]
    assert (sample.nfe, len(sample.tokens)) == (2, 2)


def test_a_seed_gives_the_same_text_and_another_seed_another(model):
    how = {"block_size": K, "max_new_tokens": 24, "unmasking": "dynamic", "threshold": 0.5}
    texts = [generate(model, [2], **how, seed=seed).tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("temperature", [0, 0.5, 2.0])
def test_confidence_is_the_probability_of_the_drawn_token(model, monkeypatch, temperature):
    """Check softmax(logits / T), and at T = 0 softmax(logits)."""
    seen = []
    choose = Static.choose
    monkeypatch.setattr(Static, "choose", lambda *a: seen.append(a[1][0]) or choose(*a))
    how = {"block_size": K, "max_new_tokens": K, "unmasking": "static", "steps": 1}
    tokens = generate(model, [2, 9, 4, 7], **how, temperature=temperature).tokens
    shares = (masked_block_logits(model, [2, 9, 4, 7]) / (temperature or 1)).softmax(-1)
    torch.testing.assert_close(seen[0], shares[range(K), tokens], rtol=1e-4, atol=1e-6)


def masked_block_logits(model, prompt):
    """Return float64 [K, padded vocabulary] logits of a block of masks after whole blocks."""
    text = torch.tensor([prompt + [MASK] * K])
    spans = make_spans(torch.zeros_like(text, dtype=torch.int32), K)
    return model.clean_logits(text, torch.arange(text.shape[1])[None], spans)[0, len(prompt) :].double()


def test_tokens_are_drawn_from_what_the_model_says(model):
    """Compare each position's counts in a block of one pass with the model by chi-square; positions are independent."""
    prompt, draws, temperature = [2, 9, 4, 7], 300, 1.3
    shares = (masked_block_logits(model, prompt) / temperature).softmax(-1)[:, : VOCABULARY.size]
    how = {"block_size": K, "max_new_tokens": K, "temperature": temperature, "unmasking": "static", "steps": 1}
    drawn = torch.tensor([generate(model, prompt, **how, seed=seed).tokens for seed in range(draws)])
    for place, share in enumerate(shares):
        expected, counts = draws * share, torch.bincount(drawn[:, place], minlength=VOCABULARY.size)
        rare = expected < 5
        pooled = [torch.cat([of[~rare], of[rare].sum()[None]]) for of in (counts, expected)]
        chi_square = float(((pooled[0] - pooled[1]) ** 2 / pooled[1].clamp(min=1)).sum())
        assert chi_square < 29.6  # at most 10 degrees of freedom, one in a thousand
    likeliest = drawn == shares.argmax(-1)
    for one, other in itertools.combinations(range(K), 2):
        both = float(shares[one].max() * shares[other].max())
        count = int((likeliest[:, one] & likeliest[:, other]).sum())
        assert abs(count - draws * both) < 4 * (draws * both * (1 - both)) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"unmasking": "beam"},
            "no unmasking rule is called 'beam': known are first-hitting, ancestral, static, dynamic, entropy",
        ),
        ({"unmasking": "statc"}, "no unmasking rule is called 'statc': did you mean static"),
        ({"unmasking": "entropy", "threshold": -0.1}, "threshold is -0.1: give nats"),
        ({"unmasking": "entropy", "threshold": float("nan")}, "threshold is nan: give nats"),
        ({"unmasking": "entropy", "steps": 2}, "steps=2 is an option of ancestral, static, dynamic.* unmasking"),
        ({"unmasking": "ancestral", "steps": 0}, "steps is 0: give 1"),
        ({"unmasking": "static", "steps": 5}, "steps is 5: give 1 to 4, the tokens of a block"),
        ({"unmasking": "dynamic", "steps": 0}, "steps is 0: give 1 or more"),
        ({"unmasking": "dynamic", "threshold": 0.0}, "threshold is 0.0: give a probability above 0, up to 1"),
        ({"unmasking": "dynamic", "threshold": 1.5}, "threshold is 1.5: give a probability"),
        ({"unmasking": "dynamic", "threshold": float("nan")}, "threshold is nan: give a probability"),
        ({"steps": 2}, "steps=2 is an option of ancestral, static, dynamic.* unmasking.*leave out steps"),
        (
            {"threshold": 0.9},
            "threshold=0.9 is an option of dynamic and entropy.* unmasking, not of first-hitting.*leave out threshold",
        ),
        (
            {"unmasking": "static", "threshold": 0.9},
            "threshold=0.9 is an option of dynamic and entropy.* unmasking, not of static",
        ),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [2], block_size=K, max_new_tokens=4, **options)


@unmasking_rules.register("test-left-to-right")
class LeftToRight(BlindRule):
    """Rules that a plug-in would add: a fixed number of positions a pass, from the left."""

    takes_steps = True

    def choose(self, masked, order, chance, step):
        return masked & (masked.cumsum() <= self.block_size // self.steps)


@unmasking_rules.register("test-doubt")
class Doubt(SightedRule):
    """A rule that takes the least confident position and all that are not above a threshold."""

    takes_threshold = Threshold(0.2, lambda value: 0 <= value < 1, "a probability below 1")

    def choose(self, confidence, entropy, masked, steps):
        left = confidence.masked_fill(~masked, 2.0)
        return masked & ((left <= self.threshold) | (left == left.min(-1, keepdim=True).values))


@unmasking_rules.register("test-nothing")
class Nothing(SightedRule):
    """A rule that breaks its contract: it takes nothing."""

    def choose(self, confidence, entropy, masked, steps):
        return masked & False


HOW = {"block_size": K, "max_new_tokens": 2 * K, "temperature": 0.5}


@pytest.mark.parametrize(("steps", "shown_blocks"), [(None, [4, 3, 2, 1]), (2, [4, 2]), (1, [4])])
def test_a_blind_rule_from_outside_takes_the_places_that_it_says(model, shown, steps, shown_blocks):
    sample = generate(model, [], unmasking="test-left-to-right", steps=steps, **HOW)
    assert [block.count(MASK) for block in shown] == shown_blocks * 2
    assert all(block == sorted(block, key=lambda token: token == MASK) for block in shown)
    assert len(sample.tokens) == 2 * K


def test_a_sighted_rule_from_outside_has_options_of_its_own(model):
    default, said, bold = (
        generate(model, [2], unmasking="test-doubt", **options, **HOW)
        for options in ({}, {"threshold": 0.2}, {"threshold": 0.9})
    )
    assert default == said
    assert bold.nfe < default.nfe
    with pytest.raises(ValueError, match=r"threshold is 1\.0: give a probability below 1"):
        generate(model, [2], unmasking="test-doubt", threshold=1.0, **HOW)
    with pytest.raises(
        ValueError, match=r"steps=2 is an option of .*dynamic, test-left-to-right unmasking, not of test-doubt"
    ):
        generate(model, [2], unmasking="test-doubt", steps=2, **HOW)
    with pytest.raises(ValueError, match="is an option of dynamic and entropy and test-doubt unmasking, not of static"):
        generate(model, [2], unmasking="static", threshold=0.2, **HOW)


def test_a_rule_that_takes_nothing_is_named(model):
    with pytest.raises(ValueError, match="the unmasking rule test-nothing chose no position of a block with masks"):
        generate(model, [2], unmasking="test-nothing", **HOW)
