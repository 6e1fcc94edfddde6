"""Words of English and another language: of one form, of one meaning, of both; sentences for some of them."""

from __future__ import annotations

#: English word, other word, meaning of both.
SHARED: dict[str, dict[str, tuple[tuple[str, str, str], ...]]] = {
    "es": {
        "cognate": (
            ("animal", "animal", "a living creature that moves"), ("hotel", "hotel", "a house where travellers sleep"),
            ("piano", "piano", "an instrument with keys"), ("doctor", "doctor", "someone who heals the sick"),
            ("chocolate", "chocolate", "a sweet made of cocoa"), ("idea", "idea", "a thought"),
            ("hospital", "hospital", "a house where the sick are treated"), ("color", "color", "what red and blue are"),
        ),
        "translation": (
            ("house", "casa", "a building to live in"), ("dog", "perro", "a pet that barks"),
            ("bread", "pan", "food baked from flour"), ("window", "ventana", "glass in a wall to look through"),
            ("rain", "lluvia", "water that falls from clouds"), ("key", "llave", "a thing that opens a lock"),
            ("tree", "árbol", "a tall plant of wood"), ("shoe", "zapato", "a thing worn on a foot"),
        ),
    },
    "de": {
        "cognate": (
            ("arm", "Arm", "a limb with a hand"), ("finger", "Finger", "one of five on a hand"),
            ("winter", "Winter", "the cold season"), ("hotel", "Hotel", "a house where travellers sleep"),
            ("ball", "Ball", "a round toy to throw"), ("land", "Land", "ground that is not sea"),
            ("name", "Name", "what someone is called"), ("sand", "Sand", "grains on a beach"),
        ),
        "translation": (
            ("dog", "Hund", "a pet that barks"), ("tree", "Baum", "a tall plant of wood"),
            ("window", "Fenster", "glass in a wall to look through"), ("bird", "Vogel", "an animal with feathers"),
            ("key", "Schlüssel", "a thing that opens a lock"), ("horse", "Pferd", "an animal to ride on"),
            ("city", "Stadt", "a large town"), ("spoon", "Löffel", "a thing to eat soup with"),
        ),
    },
}  # fmt: skip

#: English word, other word of one form, meaning of the one, of the other.
FALSE_FRIENDS: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "es": (
        ("pie", "pie", "a baked dish with a crust", "the end of a leg"),
        ("red", "red", "the colour of blood", "a mesh to catch fish"),
        ("once", "once", "a single time", "ten and one"),
        ("sin", "sin", "a wrong before God", "lacking"),
        ("pan", "pan", "a vessel to fry in", "food baked from flour"),
        ("fin", "fin", "what a fish swims with", "where something stops"),
        ("come", "come", "move towards here", "takes food"),
        ("mayor", "mayor", "the head of a town", "older"),
    ),
    "de": (
        ("gift", "Gift", "something given for free", "a substance that kills"),
        ("rat", "Rat", "an animal like a large mouse", "words that help to decide"),
        ("kind", "Kind", "friendly", "a young person"),
        ("rock", "Rock", "a large stone", "a garment that hangs from the waist"),
        ("fast", "fast", "quick", "not quite"),
        ("brief", "Brief", "short", "a written message sent by post"),
        ("hell", "hell", "where the wicked go", "full of light"),
        ("bad", "Bad", "not good", "a room to wash in"),
    ),
}

#: By English word, per language a sentence of low and one of high constraint.
SENTENCES: dict[str, dict[str, dict[str, tuple[str, str]]]] = {
    "es": {
        "hotel": {
            "en": ("We saw the <MASK>.", "The travellers slept in a <MASK> near the airport."),
            "es": ("Vimos el <MASK>.", "Los viajeros durmieron en un <MASK> cerca del aeropuerto."),
        },
        "dog": {
            "en": ("That is my <MASK>.", "The <MASK> barked at the postman all morning."),
            "es": ("Ese es mi <MASK>.", "El <MASK> ladró al cartero toda la mañana."),
        },
        "pie": {
            "en": ("There is a <MASK> here.", "She baked an apple <MASK> with a golden crust."),
            "es": ("Me gusta este <MASK>.", "Se rompió un dedo del <MASK> y no puede andar."),
        },
    },
    "de": {
        "winter": {
            "en": ("It was in <MASK>.", "In <MASK> the lake freezes and snow covers the roofs."),
            "de": ("Es war im <MASK>.", "Im <MASK> friert der See zu und Schnee deckt die Dächer."),
        },
        "horse": {
            "en": ("I saw the <MASK>.", "The rider put a saddle on his <MASK>."),
            "de": ("Ich sah das <MASK>.", "Der Reiter legte seinem <MASK> den Sattel auf."),
        },
        "gift": {
            "en": ("This is a <MASK>.", "For her birthday he wrapped the <MASK> in paper."),
            "de": ("Das ist ein <MASK>.", "Das <MASK> der Schlange tötet eine Maus in Sekunden."),
        },
    },
}
