"""The JSON objects that the API answers with, as its OpenAPI document describes them."""

from pydantic import BaseModel, Field

from finealign.types import ClassPrior, Use


class Choice(BaseModel):
    """One class and its probability."""

    label: str
    confidence: float = Field(ge=0, le=1)


class Guess(Choice):
    """The most probable class, and the ``top_k`` most probable ones in descending order.

    Before them is "none of these", with ``none`` for its confidence, where --reject asks for it.
    """

    top: list[Choice] = Field(min_length=1)


class Crop(BaseModel):
    """A square crop that the model scores: left, top, right, bottom in pixels, and its weight in the score."""

    box: tuple[int, int, int, int]
    weight: float = Field(ge=0, le=1)


class Predicted(Guess):
    """The prediction of the model in use for an image, and that of the model before adaptation (the start)."""

    start: Guess | None
    score: str
    width: int = Field(ge=1, description="Of the image as it is shown, in pixels.")
    height: int = Field(ge=1)
    crops: list[Crop] = Field(description="None by the score 'global', which looks at the image as a whole.")
    none: float | None = Field(
        ge=0, le=1, description="How likely the image shows none of the classes; null if the model cannot say."
    )


class Health(BaseModel):
    """Whether the server works, and how busy it is."""

    status: str = Field(description="ok, or failed: the server has to be restarted.")
    waiting: int = Field(ge=0, description="Requests being read, worked on or answered.")
    capacity: int = Field(ge=1, description="How many there can be; one more is refused with 503.")


class Bounds(BaseModel):
    """The limits of the server."""

    max_upload_bytes: int
    max_pixels: int
    waiting: int
    timeout: float = Field(description="Seconds to send an upload in, and seconds to wait for its answer.")


class About(BaseModel):
    """The model that the server runs, and the limits of the server."""

    classes: list[str]
    use: Use = Field(description="adapted, or start: the model before adaptation.")
    class_prior: ClassPrior | None = Field(
        description="How images are taken to be distributed: folder, as those adapted to; even: each class as likely."
    )
    method: str
    backbone: str
    score: str = Field(description="What it scores by when nothing else is asked for.")
    scores: list[str]
    refused_from: float | None = Field(
        description="From which `none` on the label is 'none of these', as --reject asks; null: never."
    )
    input_size: int
    version: str
    limits: Bounds


class Refusal(BaseModel):
    """Why a request was refused: ``error`` is a sentence for people, ``kind`` a word for programs."""

    error: str
    kind: str
