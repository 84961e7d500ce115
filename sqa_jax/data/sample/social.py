"""Social science: places, money, government, time."""

from __future__ import annotations

from sqa_jax.data.sample import banks
from sqa_jax.data.sample.skill import Draft, Skill, SplitSampler, which_is, which_label


def continent(sampler: SplitSampler) -> Draft:
    rng = sampler.rng
    name = rng.choice(sorted(banks.COUNTRIES))
    others = [c for n in sorted(banks.COUNTRIES) if n != name for c in sampler.bank(banks.COUNTRIES[n])]
    right = sampler.pick(banks.COUNTRIES[name])
    return Draft(
        f"Which of these countries is in {name}?",
        right,
        tuple(rng.sample(others, 2)),
        f"{right[0].upper() + right[1:]} is a country in {name}.",
    )


def continent_of(sampler: SplitSampler) -> Draft:
    return which_label(
        sampler, banks.COUNTRIES, "On which continent is {entry}?", "{entry} is on the continent {label}.", 2
    )


def capital(sampler: SplitSampler) -> Draft:
    asked, *others = sampler.some(banks.CAPITALS, 4)
    country, city = asked
    if sampler.rng.random() < 0.6:
        return Draft(
            f"What is the capital of {country}?",
            city,
            tuple(c for _, c in others[:2]),
            f"The capital of {country} is {city}.",
        )
    return Draft(
        f"{city} is the capital of which country?",
        country,
        tuple(c for c, _ in others[:2]),
        f"{city} is the capital of {country}.",
    )


def landform(sampler: SplitSampler) -> Draft:
    return which_is(sampler, banks.PLACES, "Which of these {is_a}?", "{entry} is {label}.", 2)


def compass(sampler: SplitSampler) -> Draft:
    rng = sampler.rng
    towns, ranks = sampler.some(banks.TOWNS, 3), rng.sample(range(5), 3)
    vertical = rng.random() < 0.5
    high, low = ("north", "south") if vertical else ("east", "west")
    ordered = [town for _, town in sorted(zip(ranks, towns, strict=True), reverse=True)]
    ask = rng.choice([high, low])
    right = ordered[0] if ask == high else ordered[-1]
    cross = rng.sample(range(5), 3)
    spots = [(c, r) if vertical else (r, c) for r, c in zip(ranks, cross, strict=True)]
    return Draft(
        f"Which of these towns is farthest {ask}?", right, tuple(t for t in towns if t != right), f"On the map {right} is farthest {ask}.",
        caption=f"A map of three towns with a compass rose. From {high} to {low}: {', '.join(ordered)}.",
        drawing={"kind": "map", "towns": [[t, *spot] for t, spot in zip(towns, spots, strict=True)]},
    )  # fmt: skip


def bar_chart(sampler: SplitSampler) -> Draft:
    rng = sampler.rng
    items, counts = sampler.some(banks.ITEMS, 3), rng.sample(range(2, 13), 3)
    shop = rng.choice(["the market", "the school fair", "the corner shop", "the farm stand"])
    bars = list(zip(items, counts, strict=True))
    if rng.random() < 0.5:
        ask = rng.choice(["most", "fewest"])
        right = (max if ask == "most" else min)(bars, key=lambda bar: bar[1])[0]
        question, wrong = f"Which fruit did {shop} sell the {ask} of?", tuple(i for i in items if i != right)
        reason = f"The bar of the {right} is the {'longest' if ask == 'most' else 'shortest'}."
    else:
        item, count = rng.choice(bars)
        question, right, wrong = (
            f"How many {item} did {shop} sell?",
            str(count),
            tuple(str(c) for c in counts if c != count),
        )
        reason = f"The bar of the {item} ends at {count}."
    return Draft(question, right, wrong, reason, caption="A bar chart of fruit sold: " + ", ".join(f"{i} {c}" for i, c in bars) + ".",
                 drawing={"kind": "bars", "bars": [list(bar) for bar in bars]})  # fmt: skip


def good_or_service(sampler: SplitSampler) -> Draft:
    return which_is(sampler, banks.TRADES, "Which of these {is_a}?", "{entry} is {label}.", 1)


def supply_and_demand(sampler: SplitSampler) -> Draft:
    item, rng = sampler.pick(banks.ITEMS), sampler.rng
    events = [
        ("bad weather destroys half of the {x} on the farms", "supply", "decreases"), ("a new machine picks {x} twice as fast", "supply", "increases"),
        ("a famous doctor says that {x} are healthy", "demand", "increases"), ("people hear that some {x} were spoiled", "demand", "decreases"),
        ("many farmers stop growing {x}", "supply", "decreases"), ("many new farms begin to grow {x}", "supply", "increases"),
        ("{x} become the favorite snack at schools", "demand", "increases"), ("shoppers decide that {x} taste too sour", "demand", "decreases"),
    ]  # fmt: skip
    text, what, way = rng.choice(events)
    other = "increases" if way == "decreases" else "decreases"
    event = text.format(x=item)
    return Draft(f"Suppose that {event}. What happens to the {what} of {item}?", f"it {way}", (f"it {other}",),
                 f"When {event}, {'sellers offer' if what == 'supply' else 'people want'} {'more' if way == 'increases' else 'fewer'}, so the {what} {way}.")  # fmt: skip


def timeline(sampler: SplitSampler) -> Draft:
    rng = sampler.rng
    events, years = sampler.some(banks.EVENTS, 3), sorted(rng.sample(range(1801, 1990), 3))
    ask = rng.choice(["first", "last"])
    right = events[0 if ask == "first" else 2]
    listed = [f"{year}: {event}" for year, event in zip(years, events, strict=True)]
    town = sampler.pick(banks.TOWNS)
    return Draft(f"Which of these events in {town} happened {ask}?", right, tuple(e for e in events if e != right),
                 f"On the timeline this is the {ask} event: {right}.", caption=f"A timeline of {town}. " + "; ".join(listed) + ".",
                 drawing={"kind": "timeline", "events": [[y, e] for y, e in zip(years, events, strict=True)]})  # fmt: skip


def branch(sampler: SplitSampler) -> Draft:
    return which_label(sampler, {f"the {n} branch": b for n, b in banks.BRANCHES.items()}, "{name} reads about the branch of government that {entry}. Which branch is it?",
                       "It is {label} that {entry}.", sampler.rng.choice([1, 2]))  # fmt: skip


def opportunity_cost(sampler: SplitSampler) -> Draft:
    name = sampler.pick(banks.NAMES)
    chosen, given_up, other = sampler.some(banks.ACTIVITIES, 3)
    first, second = sampler.rng.sample([chosen, given_up], 2)
    return Draft(
        f"What does {name} give up by choosing?", f"the chance to {given_up}", (f"the chance to {chosen}", f"the chance to {other}"),
        f"{name} cannot do both. By choosing to {chosen}, {name} gives up the chance to {given_up}.",
        hint=f"{name} has time to {first} or to {second}. {name} decides to {chosen}.",
    )  # fmt: skip


def trade(sampler: SplitSampler) -> Draft:
    one, two, three = sampler.some(banks.NAMES, 3)
    a, b, c = sampler.some(banks.ITEMS, 3)
    who, wants, brought = sampler.rng.choice([(one, b, a), (two, c, b), (three, a, c)])
    ask = sampler.rng.random() < 0.5
    wrong = [x for x in (a, b, c) if x != (wants if ask else brought)]
    return Draft(
        f"What {'does ' + who + ' want to get' if ask else 'did ' + who + ' bring'}?", wants if ask else brought, tuple(wrong),
        f"The passage says that {who} brought {brought} and wants {wants}.",
        hint=f"{one} brought {a} for lunch but wants {b}. {two} brought {b} but wants {c}. {three} brought {c} but wants {a}.",
    )  # fmt: skip


_SS = "social science"
SKILLS = [
    Skill("Identify countries of a continent", _SS, "geography", "Countries", (4, 8),
          "A continent is one of the large areas of land on Earth: Africa, Asia, Europe, North America, South America, Australia and Antarctica.", continent),
    Skill("Find the continent of a country", _SS, "geography", "Countries", (3, 7),
          "Most countries lie on one continent. A world map shows which countries share one.", continent_of),
    Skill("Name capitals", _SS, "geography", "Capitals", (5, 12), "The capital of a country is the city where its government meets.", capital),
    Skill("Identify rivers, mountains, deserts, oceans and islands", _SS, "geography", "Physical geography", (3, 8),
          "A river is flowing water. A desert gets little rain. An island is land with water all around it.", landform),
    Skill("Read a map: cardinal directions", _SS, "geography", "Maps", (2, 5),
          "On most maps, north is at the top, south at the bottom, east to the right and west to the left.", compass),
    Skill("Read a bar chart", _SS, "economics", "Charts", (2, 5), "The length of each bar shows how many there are.", bar_chart),
    Skill("Goods and services", _SS, "economics", "Goods and services", (2, 5),
          "A good is something you can touch and own. A service is work that someone does for you.", good_or_service),
    Skill("Supply and demand", _SS, "economics", "Supply and demand", (6, 12),
          "Supply is how much sellers want to sell. Demand is how much people want to buy.", supply_and_demand),
    Skill("Read a timeline", _SS, "us-history", "Timelines", (3, 7), "A timeline shows events in order. Earlier events have lower years.", timeline),
    Skill("Branches of government", _SS, "civics", "Government", (5, 12),
          "The legislative branch makes laws, the executive branch carries them out, and the judicial branch decides what they mean.", branch),
    Skill("Opportunity cost", _SS, "economics", "Costs and benefits", (4, 8), "When you choose one thing, what you give up is the cost of the choice.", opportunity_cost),
    Skill("Trading and specializing", _SS, "economics", "Trade", (3, 6), "People trade when each has something that the other wants.", trade),
]  # fmt: skip
