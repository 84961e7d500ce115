"""Banks of facts and words for the sample's questions.

Each fourth entry of a bank is kept for held-out questions, so a question of the test split asks about things that no
training question mentions.
"""

from __future__ import annotations

ANIMALS = {
    "mammal": "horse wolf whale rabbit bat kangaroo elephant otter squirrel dolphin tiger deer mouse camel gorilla zebra".split(),
    "bird": "eagle penguin parrot ostrich owl flamingo pigeon hummingbird swan toucan goose crow peacock robin pelican hawk".split(),
    "fish": "salmon shark tuna goldfish trout seahorse cod eel catfish herring carp swordfish".split(),
    "reptile": ["crocodile", "python", "tortoise", "gecko", "rattlesnake", "iguana", "alligator", "cobra",
                "sea turtle", "chameleon", "boa", "Komodo dragon"],
    "amphibian": ["tree frog", "salamander", "toad", "newt", "bullfrog", "fire salamander", "poison frog", "axolotl"],
    "insect": "ant bee butterfly beetle grasshopper mosquito ladybug dragonfly moth cricket termite wasp".split(),
}  # fmt: skip

OBJECTS = {
    "wood": ["log", "pencil", "baseball bat", "broom handle", "bookshelf", "toothpick", "canoe paddle", "picnic table"],
    "metal": ["coin", "nail", "frying pan", "paper clip", "key", "trumpet", "anchor", "wrench"],
    "glass": [
        "window pane",
        "light bulb",
        "mirror",
        "marble",
        "wine bottle",
        "test tube",
        "magnifying lens",
        "aquarium wall",
    ],
    "cloth": ["T-shirt", "towel", "curtain", "scarf", "bedsheet", "handkerchief", "flag", "sock"],
    "rubber": ["car tire", "eraser", "balloon", "bouncy ball", "rain boot", "bicycle tire", "bath duck", "swim cap"],
    "paper": ["newspaper", "envelope", "napkin", "postcard", "notebook page", "poster", "paper bag", "magazine"],
}

STATES = {
    "solid": [
        "brick",
        "ice cube",
        "spoon",
        "stone",
        "coin",
        "candle",
        "book",
        "apple",
        "plate",
        "bone",
        "hammer",
        "key",
    ],
    "liquid": [
        "milk",
        "orange juice",
        "gasoline",
        "vinegar",
        "rain",
        "honey",
        "tea",
        "olive oil",
        "ink",
        "shampoo",
        "soup broth",
        "paint",
    ],
    "gas": [
        "oxygen",
        "helium",
        "steam",
        "air in a balloon",
        "carbon dioxide",
        "nitrogen",
        "natural gas",
        "water vapor",
    ],
}

ELEMENTS = {
    "metal": [
        "iron",
        "copper",
        "gold",
        "silver",
        "aluminum",
        "zinc",
        "tin",
        "lead",
        "nickel",
        "titanium",
        "sodium",
        "calcium",
    ],
    "nonmetal": [
        "oxygen",
        "carbon",
        "helium",
        "sulfur",
        "nitrogen",
        "chlorine",
        "hydrogen",
        "neon",
        "iodine",
        "fluorine",
        "argon",
        "bromine",
    ],
}

CONDUCTORS = {
    "conductor": ["copper wire", "gold ring", "steel nail", "aluminum foil", "iron chain", "silver spoon", "brass key", "tin can",
                  "nickel coin", "zinc plate", "lead pipe", "platinum ring"],
    "insulator": ["rubber glove", "wooden stick", "plastic cup", "wool sock", "glass jar", "cotton ball", "paper plate", "foam block",
                  "leather belt", "cork", "silk scarf", "ceramic mug"],
}  # fmt: skip

CHANGES = {
    "physical change": ["ice melting in a glass", "cutting an apple", "folding a shirt", "water boiling in a pot", "breaking a plate",
                        "dissolving salt in water", "sharpening a pencil", "freezing juice", "tearing paper", "crushing a can",
                        "mixing sand and gravel", "stretching a spring"],
    "chemical change": ["a nail rusting", "wood burning in a fire", "baking a cake", "milk turning sour", "a match burning",
                        "frying an egg", "an apple slice turning brown", "a silver spoon tarnishing", "toasting bread",
                        "fireworks exploding", "a leaf rotting", "a candle wick burning"],
}  # fmt: skip

TRAITS = {
    "inherited": ["has brown eyes", "has curly hair", "has five toes on each foot", "has dimples", "has freckles", "was born with red hair",
                  "has attached earlobes", "has naturally dark skin", "has long legs", "has the blood type A", "has green eyes", "has straight hair"],
    "acquired": ["can play the violin", "has a scar on the knee", "can ride a bicycle", "speaks Spanish", "knows how to knit",
                 "has dyed blue hair", "can bake bread", "has a pierced ear", "can juggle", "knows the capital of Peru",
                 "has a tattoo", "can swim"],
}  # fmt: skip

RESOURCES = {
    "renewable": [
        "sunlight",
        "wind",
        "flowing water",
        "wood from planted trees",
        "ocean tides",
        "geothermal heat",
        "plant oil",
        "ocean waves",
        "bamboo",
        "cow manure",
        "sugar cane fuel",
        "falling water at a dam",
    ],
    "nonrenewable": [
        "coal",
        "crude oil",
        "natural gas",
        "uranium",
        "diesel fuel",
        "iron ore",
        "gasoline",
        "copper ore",
        "kerosene",
        "peat",
        "bauxite",
        "heating oil",
    ],
}

ORGANS = [
    ("heart", "pumps blood through the body"), ("lungs", "take in oxygen from the air"), ("stomach", "breaks down food with acid"),
    ("brain", "controls thoughts and movements"), ("kidneys", "clean waste out of the blood"), ("skin", "covers and protects the body"),
    ("skeleton", "supports the body"), ("liver", "makes bile and stores energy"), ("eyes", "sense light"), ("ears", "sense sound"),
    ("muscles", "pull on bones to move the body"), ("bladder", "stores urine"), ("intestines", "absorb nutrients from food"),
    ("nose", "senses smells"), ("tongue", "senses tastes"), ("teeth", "bite and chew food"),
]  # fmt: skip

CHAINS = [
    ("grass", "rabbit", "fox", "eagle"), ("algae", "snail", "crab", "octopus"), ("oak leaves", "caterpillar", "robin", "hawk"),
    ("pond weed", "tadpole", "perch", "heron"), ("phytoplankton", "krill", "penguin", "leopard seal"), ("clover", "grasshopper", "frog", "snake"),
    ("kelp", "sea urchin", "sea otter", "orca"), ("acorns", "squirrel", "weasel", "owl"), ("wheat", "mouse", "cat", "coyote"),
    ("berries", "beetle", "lizard", "falcon"), ("seaweed", "shrimp", "mackerel", "shark"), ("moss", "reindeer", "wolf", "bear"),
]  # fmt: skip

COUNTRIES = {
    "Europe": "France Germany Italy Poland Spain Greece Norway Portugal Sweden Austria Finland Ireland".split(),
    "Asia": "Japan China India Thailand Vietnam Mongolia Nepal Indonesia Iran Pakistan Malaysia Cambodia".split(),
    "Africa": "Egypt Kenya Nigeria Morocco Ghana Ethiopia Tanzania Senegal Uganda Algeria Zambia Mali".split(),
    "South America": "Brazil Peru Chile Argentina Bolivia Ecuador Colombia Uruguay".split(),
    "North America": ["Canada", "Mexico", "Cuba", "Guatemala", "the United States", "Panama", "Costa Rica", "Honduras"],
}

CAPITALS = [
    ("France", "Paris"), ("Japan", "Tokyo"), ("Egypt", "Cairo"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Russia", "Moscow"),
    ("China", "Beijing"), ("Germany", "Berlin"), ("England", "London"), ("Greece", "Athens"), ("Peru", "Lima"), ("Cuba", "Havana"),
    ("Kenya", "Nairobi"), ("Canada", "Ottawa"), ("Poland", "Warsaw"), ("Austria", "Vienna"), ("Ireland", "Dublin"), ("Norway", "Oslo"),
    ("Thailand", "Bangkok"), ("Portugal", "Lisbon"), ("Hungary", "Budapest"), ("Sweden", "Stockholm"), ("Iraq", "Baghdad"), ("Denmark", "Copenhagen"),
]  # fmt: skip

PLACES = {
    "river": [
        "the Nile",
        "the Amazon",
        "the Mississippi",
        "the Danube",
        "the Ganges",
        "the Rhine",
        "the Congo",
        "the Thames",
    ],
    "mountain": [
        "Mount Everest",
        "K2",
        "Mount Fuji",
        "Kilimanjaro",
        "Mont Blanc",
        "Mount Rainier",
        "the Matterhorn",
        "Denali",
    ],
    "desert": [
        "the Sahara",
        "the Gobi",
        "the Mojave",
        "the Kalahari",
        "the Atacama",
        "the Sonoran Desert",
        "the Namib",
        "the Negev",
    ],
    "ocean": ["the Pacific", "the Atlantic", "the Indian Ocean", "the Arctic Ocean"],
    "island": ["Madagascar", "Greenland", "Iceland", "Jamaica", "Sri Lanka", "Borneo", "Cyprus", "Tasmania"],
}

TRADES = {
    "good": ["a bicycle", "a loaf of bread", "a winter coat", "a guitar", "a basketball", "a lamp", "a box of crayons", "a tent",
             "a pair of shoes", "a sandwich", "a clock", "a couch"],
    "service": ["a haircut", "a piano lesson", "a taxi ride", "a car wash", "a dental checkup", "a guided museum tour", "lawn mowing",
                "a doctor's visit", "dog walking", "a swimming lesson", "house painting", "a massage"],
}  # fmt: skip

BRANCHES = {
    "legislative": [
        "writes bills that can become laws",
        "is made up of the Senate and the House",
        "decides how tax money is spent",
        "debates new laws",
    ],
    "executive": [
        "is led by the president",
        "carries out the laws",
        "commands the military",
        "enforces the laws each day",
    ],
    "judicial": [
        "decides what laws mean",
        "is led by the Supreme Court",
        "is made up of judges",
        "settles cases in court",
    ],
}

TOWNS = "Alton Benton Carver Dover Easton Fulton Granby Hilton Irving Jasper Kenton Lorton Milton Norton Oxley Preston Quincy Ripley Selby Truro".split()
NAMES = "Ana Ben Carla David Emma Felix Grace Hugo Iris Jamal Kira Leo Maya Nina Omar Priya Rosa Sam Tara Victor Wendy Yusuf Zoe Noah".split()
ITEMS = "apples pears plums grapes melons lemons peaches cherries oranges bananas kiwis figs mangoes apricots dates limes papayas guavas nectarines tangerines".split()
ACTIVITIES = ["swim in the lake", "ride the roller coaster", "visit the zoo", "read a comic book", "bake cookies", "play chess", "go camping",
              "watch a movie", "paint a picture", "fly a kite", "plant tulips", "build a sandcastle", "play soccer", "sing in the choir",
              "collect shells", "ride a horse"]  # fmt: skip
EVENTS = ["the bridge was built", "the school opened", "the railroad arrived", "the library burned down", "the first mayor was elected",
          "the market moved", "the dam was finished", "the museum opened", "the factory closed", "the hospital was founded",
          "the old tower fell", "the harbor was dug", "the theater closed", "the first newspaper appeared", "the park was planted", "the airport opened"]  # fmt: skip

SYNONYMS = [
    ("big", "large"), ("happy", "glad"), ("fast", "quick"), ("smart", "clever"), ("begin", "start"), ("tired", "weary"), ("angry", "mad"),
    ("choose", "pick"), ("correct", "right"), ("scared", "afraid"), ("rock", "stone"), ("wealthy", "rich"), ("street", "road"), ("finish", "end"),
    ("error", "mistake"), ("gift", "present"), ("leap", "jump"), ("shout", "yell"), ("strange", "odd"), ("trip", "journey"),
    ("calm", "peaceful"), ("brave", "bold"), ("speak", "talk"), ("help", "assist"),
]  # fmt: skip
ANTONYMS = [
    ("hot", "cold"), ("early", "late"), ("full", "empty"), ("hard", "soft"), ("light", "dark"), ("asleep", "awake"), ("open", "closed"),
    ("rough", "smooth"), ("strong", "weak"), ("tall", "short"), ("wet", "dry"), ("young", "old"), ("first", "last"), ("sharp", "dull"),
    ("cheap", "expensive"), ("deep", "shallow"), ("safe", "dangerous"), ("thick", "thin"), ("win", "lose"), ("arrive", "leave"),
    ("float", "sink"), ("push", "pull"), ("buy", "sell"), ("remember", "forget"),
]  # fmt: skip
# (base form, third person, past, object)
VERBS = [
    ("paint", "paints", "painted", "the fence"), ("wash", "washes", "washed", "the dishes"), ("fix", "fixes", "fixed", "the old radio"),
    ("carry", "carries", "carried", "the groceries"), ("cook", "cooks", "cooked", "dinner"), ("plant", "plants", "planted", "tomatoes"),
    ("visit", "visits", "visited", "the museum"), ("clean", "cleans", "cleaned", "the garage"), ("climb", "climbs", "climbed", "the hill"),
    ("open", "opens", "opened", "the window"), ("deliver", "delivers", "delivered", "the mail"), ("watch", "watches", "watched", "the parade"),
]  # fmt: skip
SPEECH = {
    "noun": ["teacher", "mountain", "kitchen", "bottle", "doctor", "garden", "planet", "blanket"],
    "verb": ["whisper", "gallop", "invent", "borrow", "shiver", "explore", "listen", "destroy"],
    "adjective": ["purple", "enormous", "hungry", "ancient", "delicious", "gentle", "crowded", "shiny"],
    "adverb": ["quickly", "softly", "often", "carefully", "yesterday", "loudly", "bravely", "never"],
}
FIGURES = {
    "simile": ["The lake was as smooth as glass.", "Her smile was like sunshine.", "He ran like the wind.", "The baby slept like a log.",
               "My hands are as cold as ice.", "The snow fell like feathers.", "Her voice is as clear as a bell.", "The old man was as wise as an owl."],
    "metaphor": ["The classroom was a zoo.", "Time is a thief.", "Her words were daggers.", "The road was a ribbon of moonlight.",
                 "My brother is a night owl.", "The stars were diamonds.", "Homework is a mountain.", "His heart is a stone."],
    "personification": ["The wind whispered through the trees.", "The flowers danced in the breeze.", "The old stairs groaned.", "The sun smiled down on us.",
                        "The alarm clock yelled at me.", "The fog crept over the hill.", "The ocean swallowed the ship.", "The moon watched over the town."],
    "hyperbole": ["I have told you a million times.", "This bag weighs a ton.", "I could eat a horse.", "My feet are killing me.",
                  "The line was a thousand miles long.", "I have been waiting forever.", "She cried an ocean of tears.", "He is older than the hills."],
}  # fmt: skip
KINDS = {
    "declarative": ["The dog sleeps on the porch.", "We ate soup for lunch.", "Rain fell all night.", "My aunt lives in Ohio.", "The train leaves at noon.",
                    "Birds build nests in spring.", "The store closes at nine.", "Our team won the game."],
    "interrogative": ["Where did you put the keys?", "Is the soup too hot?", "Who left the gate open?", "Can we go to the park?", "What time is it now?",
                      "Why is the sky blue?", "Have you seen my hat?", "Did the mail come?"],
    "imperative": ["Close the door, please.", "Wash your hands before dinner.", "Turn left at the corner.", "Bring me the blue cup.", "Feed the cat now.",
                   "Do not touch the stove.", "Sit down over there.", "Write your name on the line."],
    "exclamatory": ["What a huge pumpkin that is!", "I can't believe we won!", "How fast that car is!", "We are finally home!", "What a beautiful day it is!",
                    "That spider is enormous!", "I love this song so much!", "How tall you have grown!"],
}  # fmt: skip
COMPLETE = {
    "a complete sentence": ["The cat chased the string.", "My sister plays the flute.", "We walked to the river.", "The bell rang at noon.", "Two boys shared a pizza.",
                            "The lamp fell off the desk.", "Snow covered the road.", "Dad painted the shed."],
    "a fragment": ["The tall man in the coat.", "Running down the hill.", "Under the old bridge.", "Because of the rain.", "A basket full of apples.",
                   "After the long game.", "The bright red kite.", "Sleeping on the couch."],
    "a run-on sentence": ["It was late we went home.", "I like tea he likes milk.", "The dog barked the baby cried.", "She sings well she dances too.",
                          "The sun set it got dark.", "He fell down he hurt his arm.", "We were hungry we made lunch.", "The bus left I missed it."],
}  # fmt: skip
CLIMATE = {
    "weather": ["A thunderstorm hit the town last night.", "It is foggy this morning.", "Yesterday was windy at the beach.", "Three inches of snow fell on Monday.",
                "It rained during the game today.", "The sky is clear this afternoon.", "Hail damaged cars on Friday.", "Tonight will be cold and cloudy."],
    "climate": ["Summers here are usually hot and dry.", "The island gets much rain each year.", "Winters in this region are mild.", "Deserts get little rain all year.",
                "This coast is humid most of the year.", "Spring is usually cool in the valley.", "The north has long, cold winters.", "On average, June is the wettest month."],
}  # fmt: skip


def split_entries(bank: list, held_out: bool) -> list:
    """The entries of a bank for training questions, or those for held-out questions."""
    return [entry for k, entry in enumerate(bank) if (k % 4 == 3) == held_out]
