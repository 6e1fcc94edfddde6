"""Clues of our own that fit several connections, for walls with red herrings."""

from __future__ import annotations

#: Clues by what connects them. Many stand in two or three of these lists: those are the herrings.
CONNECTIONS: dict[str, tuple[str, ...]] = {
    line.split(": ")[0]: tuple(line.split(": ")[1].split(", "))
    for line in """
planets: Mercury, Venus, Earth, Mars, Jupiter, Saturn, Neptune, Uranus
Roman gods: Mercury, Venus, Mars, Jupiter, Saturn, Neptune, Vulcan, Diana, Minerva, Juno, Apollo
metals: Mercury, Iron, Lead, Tin, Zinc, Copper, Silver, Gold, Nickel
American coins: Nickel, Penny, Dime, Quarter
fractions: Quarter, Half, Third, Eighth, Fifth
colours: Gold, Silver, Orange, Violet, Pink, Olive, Rose, Cream, Amber, Plum, Lime
fruits: Orange, Olive, Plum, Peach, Apple, Lime, Date, Fig, Pear, Kiwi
flowers: Rose, Violet, Iris, Lily, Daisy, Poppy, Pink, Tulip, Jasmine
women's names: Rose, Violet, Iris, Lily, Daisy, Poppy, Jasmine, Ruby, Amber, Pearl, Diana, Penny, Heather, Olive, Grace
gems: Ruby, Amber, Pearl, Opal, Jade, Emerald, Topaz, Diamond
parts of the eye: Iris, Pupil, Lens, Retina, Cornea, Lid
people at school: Pupil, Teacher, Tutor, Head, Dean, Prefect
parts of the body: Head, Foot, Hand, Chest, Nail, Palm, Calf, Sole, Eye, Arm, Trunk
trees: Palm, Ash, Elm, Beech, Oak, Pine, Plum, Fig, Lime, Olive
young animals: Calf, Cub, Kid, Lamb, Foal, Kitten, Puppy, Fawn
meats: Lamb, Beef, Pork, Veal, Ham, Venison
fish: Sole, Perch, Bass, Pike, Skate, Carp, Ray, Cod
units of length: Foot, Yard, Hand, Chain, Mile, Inch, Rod, Perch, League, Furlong
instruments: Bass, Drum, Harp, Triangle, Horn, Organ, Recorder, Flute
shapes: Triangle, Square, Diamond, Circle, Oval, Star, Crescent, Kite
birds: Kite, Kiwi, Crane, Swift, Robin, Swallow, Jay, Eagle
writers: Swift, Woolf, Dickens, Austen, Hardy, Shelley, Eliot
tools: Spade, Hammer, Saw, Drill, File, Plane, Chisel, Nail, Crane
card suits: Diamond, Heart, Club, Spade
organs: Heart, Liver, Lung, Kidney, Skin
vehicles: Plane, Tram, Ship, Car, Bus, Lorry
containers: Chest, Box, Trunk, Case, Crate, Tin, Drum
parts of a tree: Trunk, Branch, Leaf, Root, Bark, Crown
animal sounds: Bark, Growl, Howl, Bleat, Hiss
ways to cook: Boil, Fry, Roast, Poach, Grill, Bake
weapons: Club, Pike, Mace, Spear, Bow, Sword
spices: Mace, Clove, Ginger, Cumin, Nutmeg, Saffron
computer parts: Mouse, Monitor, Screen, Keyboard, Port, Chip, Case
lizards: Monitor, Gecko, Iguana, Skink
rodents: Mouse, Rat, Hamster, Vole, Beaver
fortified wines: Port, Sherry, Madeira, Marsala
islands: Madeira, Malta, Java, Jersey, Crete, Cyprus, Guernsey
programming languages: Java, Python, Ruby, Swift, Rust, Perl
snakes: Python, Cobra, Viper, Adder, Boa, Mamba
clothes: Jersey, Coat, Skirt, Boa, Scarf, Tie
hats: Bowler, Fedora, Beret, Crown, Cap
cricketers: Bowler, Batsman, Keeper, Slip
underwear: Slip, Bra, Vest, Briefs
apples: Gala, Fuji, Pippin, Bramley
mountains: Fuji, Everest, Elbrus, Olympus, Snowdon
""".strip().splitlines()
}
