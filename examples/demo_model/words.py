"""The words of the questions and answers, in three languages."""

from __future__ import annotations

from .scenes import Thing

NAMES = {
    "en": {word: word for word in ("circle", "square", "triangle", "star", "heart", "cross",
           "red", "orange", "yellow", "green", "blue", "purple", "black", "white")},
    "zh": {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "heart": "心形",
           "cross": "十字形", "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色",
           "purple": "紫色", "black": "黑色", "white": "白色"},
    "es": {"circle": "círculo", "square": "cuadrado", "triangle": "triángulo", "star": "estrella", "heart": "corazón",
           "cross": "cruz", "red": "rojo", "orange": "naranja", "yellow": "amarillo", "green": "verde",
           "blue": "azul", "purple": "morado", "black": "negro", "white": "blanco"},
}  # fmt: skip

_SPANISH_PLURALS = {"corazón": "corazones", "cruz": "cruces", "azul": "azules"}
PLURALS = {
    "en": {key: f"{word}es" if word == "cross" else f"{word}s" for key, word in NAMES["en"].items()},
    "zh": NAMES["zh"],
    "es": {key: _SPANISH_PLURALS.get(word, f"{word}s") for key, word in NAMES["es"].items()},
}
for _colour in ("red", "orange", "yellow", "green", "blue", "purple", "black", "white"):
    PLURALS["en"][_colour] = _colour
_FEMININE = ("estrella", "cruz", "estrellas", "cruces")


def agreed(noun: str, colour: str) -> str:
    """Spanish: a colour in its noun's gender: estrella roja."""
    if noun not in _FEMININE:
        return colour
    for masculine, feminine in (("os", "as"), ("o", "a")):
        if colour.endswith(masculine):
            return colour[: -len(masculine)] + feminine
    return colour


def named(thing: Thing, language: str, *, article: bool = True, colour: bool = True) -> str:
    """ "a red circle", "红色圆形", "una estrella roja"; without its article, or without its colour."""
    shape, ink = NAMES[language][thing.shape], NAMES[language][thing.colour]
    if language == "zh":
        return f"{ink}{shape}" if colour else shape
    if language == "es":
        words = f"{shape} {agreed(shape, ink)}" if colour else shape
        return f"{'una' if shape in _FEMININE else 'un'} {words}" if article else words
    words = f"{ink} {shape}" if colour else shape
    return f"{'an' if words.startswith('o') else 'a'} {words}" if article else words


def how_many_both(language: str, shape: str, colour: str) -> str:
    """The noun of "how many red circles"."""
    shapes, ink = PLURALS[language][shape], PLURALS[language][colour]
    if language == "zh":
        return f"{ink}{shapes}"
    return f"{shapes} {agreed(shapes, ink)}" if language == "es" else f"{ink} {shapes}"


ANSWERS = {
    "en": {"first": "the first", "second": "the second", "unknown": "I only know simple drawings."},
    "zh": {"unknown": "我只认识简单的图画。"},
    "es": {"unknown": "Solo conozco dibujos sencillos."},
}

ASK: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "shape": ("What shape is this?", "What shape is it?", "Which shape is this?", "What shape is in the picture?",
            "What shape do you see?", "Name the shape.", "What is the shape?", "which shape is it",
            "What shape is in this image?", "What shape is shown?"),
        "shape_of": ("What shape is the {} object?", "What shape is the {} one?", "Which shape is {}?",
            "What is the shape of the {} object?", "What shape is the {} thing?", "What is {}?",
            "Which object is {}?"),
        "colour": ("What colour is it?", "What color is it?", "What color is this?", "What colour is this?",
            "What color is the shape?", "What colour is the shape?", "Which colour is it?",
            "What color is the object?", "Name the color.", "What color is this shape?", "What colour is the object?"),
        "colour_of": ("What colour is the {}?", "What color is the {}?", "Which color is the {}?",
            "Which colour does the {} have?", "What is the color of the {}?", "What is the colour of the {}?",
            "what color is the {}"),
        "name": ("What is this?", "What is in the picture?", "What do you see?", "What is shown here?",
            "Describe the picture.", "What is in this picture?", "What can you see?", "What's this?",
            "What is in the image?", "What does the picture show?", "What is it?", "Describe this image.",
            "Describe what you see."),
        "count_all": ("How many shapes are there?", "How many objects are there?", "How many things are there?",
            "How many shapes are in the picture?", "How many objects do you see?", "How many shapes do you see?",
            "How many objects are in the picture?", "Count the shapes.", "Count the objects.",
            "How many shapes are in this image?", "how many shapes"),
        "count": ("How many {} are there?", "How many {} do you see?", "How many {} are in the picture?",
            "Count the {}.", "How many {} can you see?", "How many {} are in this image?", "What is the number of {}?",
            "how many {} are there", "How many {}?"),
        "coloured": ("{} shapes", "{} objects", "{} things"),
        "left": ("left of", "to the left of"),
        "right": ("right of", "to the right of"),
        "above": ("above", "over"),
        "below": ("below", "under"),
        "beside": ("What is {} the {}?", "What is {} the {}?", "Which shape is {} the {}?",
            "What do you see {} the {}?", "What's {} the {}?", "Which object is {} the {}?", "what is {} the {}"),
        "is_beside": ("Is the {} {} the {}?",),
        "digits_one": ("What digit is this?", "Which digit is this?", "What number is this?",
            "Which number do you see?", "Read the digit.", "What is the number?", "What number is in the picture?"),
        "digits_more": ("What number is this?", "Which number do you see?", "What number is written here?",
            "Read the number.", "Read the digits.", "What is the number?", "What number is in the picture?",
            "Which digits are these?"),
        "letters_one": ("What letter is this?", "Which letter is this?", "Which letter do you see?",
            "Read the letter.", "What is the letter?", "What letter is in the picture?"),
        "letters_more": ("What letters are these?", "Which letters do you see?", "What letters are written here?",
            "Read the letters.", "What are the letters?", "Which letters are in the picture?"),
        "read": ("What does it say?", "What is written here?", "Read the text.", "What do you read?",
            "What is the text?", "Read this.", "What does the picture say?", "What text is in the picture?",
            "what does it say"),
        "which": ("Which picture shows {}?", "Which picture has {}?", "Which image shows {}?",
            "Which of the pictures shows {}?", "In which picture is {}?", "Which one shows {}?",
            "Which of the two pictures shows {}?", "Which image has {}?"),
        "what_in": ("What is in the {} picture?", "What does the {} picture show?", "What is in the {} image?",
            "What do you see in the {} picture?"),
        "then_shape": ("And what shape is it?", "What shape is it?", "And its shape?", "And which shape?",
            "And the shape?"),
        "then_colour": ("And what colour is it?", "And what color is it?", "What color is it?", "And its color?",
            "What colour is it?", "And the colour?", "And its colour?", "And the color?"),
        "then_count": ("And how many are there?", "How many are there?", "And how many?"),
        "and": ("And the {}?", "And what about the {}?", "What about the {}?"),
        "and_count": ("And how many {}?", "And {}?", "And how many {} are there?", "What about {}?"),
    },
    "zh": {
        "shape": ("这是什么形状？", "图中是什么形状？", "这是什么图形？", "你看到什么形状？", "图片里是什么形状？",
            "是什么形状？"),
        "shape_of": ("{}的是什么形状？", "{}的图形是什么？", "{}的物体是什么形状？", "什么形状是{}的？"),
        "colour": ("这是什么颜色？", "它是什么颜色？", "图形是什么颜色的？", "是什么颜色？", "这个图形是什么颜色？",
            "什么颜色？"),
        "colour_of": ("{}是什么颜色？", "{}是什么颜色的？", "这个{}是什么颜色？", "{}的颜色是什么？"),
        "name": ("这是什么？", "图中有什么？", "你看到了什么？", "图片里有什么？", "图片里是什么？", "描述这张图片。"),
        "count_all": ("有几个图形？", "图中有多少个图形？", "一共有几个图形？", "有多少个形状？", "有几个物体？",
            "图片里有几个图形？"),
        "count": ("有几个{}？", "有多少个{}？", "图中有几个{}？", "图中有多少个{}？", "图片里有几个{}？",
            "你看到几个{}？"),
        "coloured": ("{}的图形", "{}图形", "{}的物体"),
        "then_shape": ("是什么形状？", "那形状呢？", "形状呢？"),
        "then_colour": ("是什么颜色？", "那颜色呢？", "颜色呢？"),
        "then_count": ("有几个？", "那有多少个？"),
        "and": ("那{}呢？", "{}呢？"),
        "and_count": ("那{}呢？", "{}有几个？", "{}呢？"),
    },
    "es": {
        "shape": ("¿Qué forma es?", "¿Qué forma es esta?", "¿Qué forma ves?", "¿Qué figura es?",
            "¿Qué forma hay en la imagen?", "¿Qué figura ves?", "¿Cuál es la forma?"),
        "shape_of": ("¿Qué forma tiene el objeto {}?", "¿Qué es {}?", "¿Qué forma es de color {}?",
            "¿Qué figura es de color {}?"),
        "colour": ("¿De qué color es?", "¿Qué color es?", "¿De qué color es la figura?", "¿De qué color es la forma?",
            "¿Qué color tiene?", "¿Cuál es el color?"),
        "colour_of": ("¿De qué color es el {}?", "¿Qué color tiene el {}?", "¿Cuál es el color del {}?"),
        "name": ("¿Qué es esto?", "¿Qué hay en la imagen?", "¿Qué ves?", "¿Qué muestra la imagen?",
            "¿Qué se ve en la imagen?", "Describe la imagen."),
        "count_all": ("¿Cuántas figuras hay?", "¿Cuántos objetos hay?", "¿Cuántas formas hay?",
            "¿Cuántas figuras ves?", "¿Cuántos objetos ves?", "¿Cuántas figuras hay en la imagen?"),
        "count": ("¿Cuántos {} hay?", "¿Cuántos {} ves?", "¿Cuántos {} hay en la imagen?", "¿Cuántos {} se ven?"),
        "coloured": ("objetos {}",),
        "then_shape": ("¿Y qué forma es?", "¿Y la forma?", "¿Y su forma?"),
        "then_colour": ("¿Y de qué color es?", "¿Y el color?", "¿Y su color?", "¿De qué color es?"),
        "then_count": ("¿Y cuántos hay?", "¿Cuántos hay?"),
        "and": ("¿Y el {}?", "¿Y qué hay del {}?"),
        "and_count": ("¿Y {}?", "¿Y cuántos {}?", "¿Y cuántos {} hay?"),
    },
}  # fmt: skip


def gendered(text: str) -> str:
    """Spanish: el, del and Cuántos before a feminine noun."""
    for noun in _FEMININE:
        text = text.replace(f"del {noun}", f"de la {noun}").replace(f"el {noun}", f"la {noun}")
        text = text.replace(f"uántos {noun}", f"uántas {noun}")
    return text
