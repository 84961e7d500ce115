"""Natural science: living things, matter, forces, measurement, experiments."""

from __future__ import annotations

from sqa_jax.data.sample import banks
from sqa_jax.data.sample.skill import Draft, Skill, SplitSampler, which_is, which_label, with_article


def animal_of_class(sampler: SplitSampler) -> Draft:
    return which_is(sampler, banks.ANIMALS, "Which of these animals {is_a}?", "{entry}: this animal is {label}.", 2)


def class_of_animal(sampler: SplitSampler) -> Draft:
    return which_label(
        sampler,
        banks.ANIMALS,
        "What kind of animal is {a_entry}?",
        "An animal such as {entry} belongs to the group: {label}.",
        2,
    )


def object_of_material(sampler: SplitSampler) -> Draft:
    groups = {f"usually made of {material}": things for material, things in banks.OBJECTS.items()}
    rng = sampler.rng
    label = rng.choice(sorted(groups))
    right = sampler.pick(groups[label])
    wrong = [sampler.pick(groups[name]) for name in rng.sample([n for n in sorted(groups) if n != label], 2)]
    return Draft(
        f"Which of these is {label}?",
        with_article(right),
        tuple(map(with_article, wrong)),
        f"{with_article(right).capitalize()} is {label}.",
    )


def state_of_matter(sampler: SplitSampler) -> Draft:
    return which_label(
        sampler,
        banks.STATES,
        "{name} thinks of this: {entry}. Is it a solid, a liquid, or a gas?",
        "{entry}: this is a {label}.",
    )


def example_of_state(sampler: SplitSampler) -> Draft:
    return which_is(sampler, banks.STATES, "Which of these {is_a}?", "{entry} is {label}.", 2)


def element_kind(sampler: SplitSampler) -> Draft:
    return which_is(sampler, banks.ELEMENTS, "Which of these elements {is_a}?", "The element {entry} is {label}.", 2)


def conductor(sampler: SplitSampler) -> Draft:
    return which_is(
        sampler, banks.CONDUCTORS, "Which of these {is_a} of electricity?", "The {entry} is {label} of electricity.", 2
    )


def kind_of_change(sampler: SplitSampler) -> Draft:
    return which_label(
        sampler, banks.CHANGES, "{name} sees {entry}. What kind of change is this?", "{entry}: this is a {label}."
    )


def kind_of_trait(sampler: SplitSampler) -> Draft:
    name, label = sampler.pick(banks.NAMES), sampler.rng.choice(sorted(banks.TRAITS))
    trait = sampler.pick(banks.TRAITS[label])
    other = "acquired" if label == "inherited" else "inherited"
    return Draft(
        f"{name} {trait}. Is this trait inherited or acquired?", label, (other,),
        f"{name} {trait}. This is an {label} trait, because people {'are born with it' if label == 'inherited' else 'learn or get it during life'}.",
    )  # fmt: skip


def resource(sampler: SplitSampler) -> Draft:
    groups = {f"{kind} resource": things for kind, things in banks.RESOURCES.items()}
    return which_is(sampler, groups, "Which of these {is_a}?", "{entry} is {label}.", 1)


def organ(sampler: SplitSampler) -> Draft:
    asked, *others = sampler.some(banks.ORGANS, 3)
    name, job = asked
    if sampler.rng.random() < 0.5:
        return Draft(f"Which part of the body {job}?", name, tuple(n for n, _ in others), f"The {name}: it {job}.")
    return Draft(
        f"What is the main job of the {name} in the body?", job, tuple(j for _, j in others), f"The {name}: it {job}."
    )


def magnets(sampler: SplitSampler) -> Draft:
    rng = sampler.rng
    poles = [rng.choice(["NS", "SN"]) for _ in range(2)]
    facing = poles[0][1], poles[1][0]
    names = {"N": "north", "S": "south"}
    right, wrong = ("attract", "repel") if facing[0] != facing[1] else ("repel", "attract")
    first, second = sampler.some(banks.NAMES, 2)
    return Draft(
        f"{first} puts a magnet next to {second}'s magnet. Will the magnets attract or repel each other?", right, (wrong,),
        f"The {names[facing[0]]} pole faces the {names[facing[1]]} pole. {'Different' if right == 'attract' else 'Like'} poles {right}.",
        hint="Magnets that attract pull together. Magnets that repel push apart.",
        caption=f"Two bar magnets in a line. The {names[facing[0]]} pole of one faces the {names[facing[1]]} pole of the other.",
        drawing={"kind": "magnets", "poles": poles},
    )  # fmt: skip


def thermometer(sampler: SplitSampler) -> Draft:
    rng = sampler.rng
    # Training reads even temperatures, held-out questions odd ones.
    values = rng.sample(range(-9 if sampler.held_out else -10, 46, 2), 3)
    place = rng.choice(["a garden", "a kitchen", "a cellar", "a pond", "a greenhouse", "an attic"])
    right, *wrong = (f"{value}°C" for value in values)
    return Draft(
        f"Select the temperature shown by the thermometer in {place}.", right, tuple(wrong), f"The red column ends at {right}.",
        caption=f"A thermometer in {place}. The red column ends at {right}.", drawing={"kind": "thermometer", "value": values[0]},
    )  # fmt: skip


def food_chain(sampler: SplitSampler) -> Draft:
    rng, chain = sampler.rng, sampler.pick(banks.CHAINS)
    roles = ["the producer", "the primary consumer", "the secondary consumer", "the top predator"]
    place = rng.randrange(4)
    wrong = rng.sample([link for k, link in enumerate(chain) if k != place], 2)
    if place in (1, 2, 3) and rng.random() < 0.5:
        question = f"Based on the food chain, what eats the {chain[place - 1]}?"
        reason = f"The arrow from the {chain[place - 1]} points to the {chain[place]}, which eats it."
    else:
        question = f"Which of these is {roles[place]} in the food chain?"
        reason = f"The {chain[place]} is number {place + 1} in the chain, so it is {roles[place]}."
    return Draft(question, chain[place], tuple(wrong), reason, caption="A food chain: " + " → ".join(chain) + ".",
                 drawing={"kind": "chain", "links": list(chain)})  # fmt: skip


def experiment(sampler: SplitSampler) -> Draft:
    name = sampler.pick(banks.NAMES)
    studies = [
        ("grew bean plants", "amount of water", "height of the plants"), ("rolled balls down a ramp", "height of the ramp", "distance the balls rolled"),
        ("dissolved sugar in tea", "temperature of the tea", "time to dissolve"), ("dropped paper planes", "length of the wings", "time in the air"),
        ("grew bread mold", "amount of light", "area of the mold"), ("launched rubber bands", "length of the stretch", "distance they flew"),
        ("melted ice cubes", "size of the cubes", "time to melt"), ("grew tomato plants", "kind of soil", "number of tomatoes"),
        ("tested batteries", "brand of the battery", "hours of light"), ("baked muffins", "oven temperature", "height of the muffins"),
        ("washed shirts", "kind of soap", "size of the stain"), ("bounced balls", "height of the drop", "height of the bounce"),
    ]  # fmt: skip
    did, changed, measured = sampler.pick(studies)
    asked = sampler.rng.random() < 0.5
    right, wrong = (changed, measured) if asked else (measured, changed)
    return Draft(
        f"Which was the {'independent' if asked else 'dependent'} variable in the experiment?", f"the {right}", (f"the {wrong}",),
        f"{name} changed the {changed} (independent variable) and measured the {measured} (dependent variable).",
        hint=f"{name} {did}. Each time, {name} changed the {changed} and measured the {measured}.",
    )  # fmt: skip


def weather_or_climate(sampler: SplitSampler) -> Draft:
    return which_label(
        sampler,
        banks.CLIMATE,
        '{name} says: "{entry}" Does this describe weather or climate?',
        "The sentence describes {label}.",
    )


_NS = "natural science"
SKILLS = [
    Skill("Identify mammals, birds, fish, reptiles, and amphibians", _NS, "biology", "Classification", (2, 5),
          "Mammals have hair and feed milk to their young. Birds have feathers. Fish live in water and have fins. Reptiles have scaly, dry skin. "
          "Amphibians live in water and on land and have moist skin. Insects have six legs.", animal_of_class),
    Skill("Classify an animal", _NS, "biology", "Classification", (3, 6),
          "Scientists sort animals into groups with similar traits, such as mammals, birds, fish, reptiles, amphibians and insects.", class_of_animal),
    Skill("Identify the material of an object", _NS, "chemistry", "Materials", (2, 4),
          "A material is what an object is made of. Wood, metal, glass, cloth, rubber and paper are materials.", object_of_material),
    Skill("Solid, liquid, or gas?", _NS, "chemistry", "States of matter", (2, 4),
          "A solid keeps its own shape. A liquid takes the shape of its container. A gas spreads out to fill its container.", state_of_matter),
    Skill("Find a solid, liquid, or gas", _NS, "chemistry", "States of matter", (2, 5),
          "Solids keep their size and shape, liquids keep only their size, and gases keep neither.", example_of_state),
    Skill("Classify elements as metals and nonmetals", _NS, "chemistry", "Elements", (7, 10),
          "Metals are usually shiny, can be hammered flat and conduct electricity. Nonmetals are often gases or brittle solids.", element_kind),
    Skill("Compare conductors and insulators", _NS, "physics", "Electricity", (4, 7),
          "A conductor lets electricity pass through it easily. Metals are good conductors. An insulator does not let electricity pass.", conductor),
    Skill("Compare physical and chemical changes", _NS, "chemistry", "Physical and chemical change", (5, 8),
          "In a chemical change the type of matter changes, as in burning, rusting and cooking. In a physical change it stays the same.", kind_of_change),
    Skill("Inherited and acquired traits", _NS, "biology", "Heredity", (4, 8),
          "Inherited traits are passed down from parents. Acquired traits are gained during life, by learning or from the environment.", kind_of_trait),
    Skill("Renewable and nonrenewable resources", _NS, "earth-science", "Natural resources", (5, 8),
          "A renewable resource is replaced by nature quickly. A nonrenewable resource is used up faster than it forms.", resource),
    Skill("Body systems: organs and their functions", _NS, "biology", "Anatomy", (4, 9),
          "Organs are body parts with a job. Each organ works with others to keep the body alive.", organ),
    Skill("Will the magnets attract or repel?", _NS, "physics", "Magnets", (3, 6),
          "Every magnet has a north and a south pole. Opposite poles attract. Like poles, two north or two south poles, repel.", magnets),
    Skill("Read a thermometer", _NS, "physics", "Measurement", (2, 5),
          "A thermometer measures temperature. Find the top of the red column and read the number beside it.", thermometer),
    Skill("Interpret food chains", _NS, "biology", "Ecosystems", (4, 9),
          "A food chain shows who eats whom. It begins with a producer. A primary consumer eats the producer, a secondary consumer eats the primary one. "
          "Arrows point to the eater.", food_chain),
    Skill("Identify independent and dependent variables", _NS, "science-and-engineering-practices", "Designing experiments", (6, 12),
          "The independent variable is what is changed in an experiment. The dependent variable is what is measured.", experiment),
    Skill("Weather and climate", _NS, "earth-science", "Weather and climate", (3, 7),
          "Weather is what the air is like at one place and time. Climate is the pattern of weather over many years.", weather_or_climate),
]  # fmt: skip
