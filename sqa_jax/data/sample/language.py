"""Language science: words, sentences, style."""

from __future__ import annotations

from sqa_jax.data.sample import banks
from sqa_jax.data.sample.skill import Draft, Skill, SplitSampler, which_is, which_label


def sentence_kind(sampler: SplitSampler) -> Draft:
    return which_label(
        sampler, banks.KINDS, '{name} wrote: "{entry}" What kind of sentence is this?', "The sentence is {label}."
    )


def tense(sampler: SplitSampler) -> Draft:
    name, (base, third, past, thing) = sampler.pick(banks.NAMES), sampler.pick(banks.VERBS)
    forms = {
        "past tense": f"{name} {past} {thing}.",
        "present tense": f"{name} {third} {thing}.",
        "future tense": f"{name} will {base} {thing}.",
    }
    label = sampler.rng.choice(sorted(forms))
    if sampler.rng.random() < 0.5:
        return Draft(
            f"Which tense does the sentence use? {forms[label]}",
            label,
            tuple(n for n in sorted(forms) if n != label),
            f"The verb is in the {label}.",
        )
    return Draft(
        f"Which sentence is in the {label}?",
        forms[label],
        tuple(forms[n] for n in sorted(forms) if n != label),
        f"The {label}: {forms[label]}",
    )


def _pairs(
    sampler: SplitSampler, pairs: list[tuple[str, str]], question: str, solution: str, decoys: list[tuple[str, str]]
) -> Draft:
    """A word of a pair is asked for, given the other; decoys are other pairs' words."""
    (one, two), *others = sampler.some(pairs, 3)
    if sampler.rng.random() < 0.5:
        one, two = two, one
    wrong = [sampler.rng.choice(pair) for pair in [*others[:1], sampler.pick(decoys)]]
    if two in wrong or one in wrong:
        wrong = [pair[0] for pair in others]
    return Draft(question.format(word=one), two, tuple(wrong), solution.format(one=one, two=two))


def synonym(sampler: SplitSampler) -> Draft:
    return _pairs(
        sampler,
        banks.SYNONYMS,
        "Which word means nearly the same as {word}?",
        "{one} and {two} are synonyms.",
        banks.ANTONYMS,
    )


def antonym(sampler: SplitSampler) -> Draft:
    return _pairs(
        sampler,
        banks.ANTONYMS,
        "Which word means the opposite of {word}?",
        "{one} and {two} are antonyms.",
        banks.SYNONYMS,
    )


def figure_of_speech(sampler: SplitSampler) -> Draft:
    return which_label(
        sampler,
        banks.FIGURES,
        '{name} wrote: "{entry}" Which figure of speech is this?',
        "The sentence is an example of {label}.",
        2,
    )


def part_of_speech(sampler: SplitSampler) -> Draft:
    return which_is(sampler, banks.SPEECH, "Which of these words {is_a}?", "The word {entry} is {label}.", 2)


def completeness(sampler: SplitSampler) -> Draft:
    rng, label = sampler.rng, sampler.rng.choice(sorted(banks.COMPLETE))
    right = sampler.pick(banks.COMPLETE[label])
    wrong = [sampler.pick(banks.COMPLETE[name]) for name in sorted(banks.COMPLETE) if name != label]
    return Draft(f"Which is {label}?", right, tuple(wrong[: rng.choice([1, 2])]), f"This is {label}: {right}")


def pronoun(sampler: SplitSampler) -> Draft:
    one, two, three = sampler.some(banks.NAMES, 3)
    thing, other = sampler.some(banks.ACTIVITIES, 2)
    asked_first = sampler.rng.random() < 0.5
    right, wrong = (one, two) if asked_first else (two, one)
    return Draft(
        f"Who wants to {thing if asked_first else other}?", right, (wrong, three), f"The passage says so of {right}.",
        hint=f"{one} would like to {thing}. {two} would rather {other}. {three} has no plans.",
    )  # fmt: skip


_LS = "language science"
SKILLS = [
    Skill("Identify sentence types", _LS, "grammar", "Sentences", (4, 8),
          "A declarative sentence states something, an interrogative one asks, an imperative one commands, an exclamatory one shows strong feeling.", sentence_kind),
    Skill("Identify the verb tense", _LS, "verbs", "Verb tense", (3, 6),
          "Past tense tells what has happened, present tense what happens, future tense, with will, what is going to happen.", tense),
    Skill("Choose the synonym", _LS, "vocabulary", "Synonyms", (2, 5), "Synonyms are words with nearly the same meaning.", synonym),
    Skill("Choose the antonym", _LS, "vocabulary", "Antonyms", (2, 5), "Antonyms are words with opposite meanings.", antonym),
    Skill("Identify figures of speech", _LS, "figurative-language", "Literary devices", (6, 12),
          "A simile compares with like or as. A metaphor says that one thing is another. Personification gives human actions to things. "
          "Hyperbole is a great exaggeration.", figure_of_speech),
    Skill("Identify parts of speech", _LS, "grammar", "Parts of speech", (3, 8),
          "A noun names a person, place or thing. A verb is an action. An adjective describes a noun. An adverb tells how or when.", part_of_speech),
    Skill("Is it a complete sentence, a fragment, or a run-on?", _LS, "writing-strategies", "Sentences, fragments, and run-ons", (3, 8),
          "A complete sentence has a subject and a verb. A fragment lacks one. A run-on joins two sentences without a proper mark.", completeness),
    Skill("Find who a passage speaks of", _LS, "reading-comprehension", "Read-alone texts", (1, 4), "Look in the passage for the words of the question.", pronoun),
]  # fmt: skip
