"""The other side of benchmarks/act.py: an endpoint that does nothing but read and write the same kind of body."""

from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()


class Question(BaseModel):
    observation: list[float]
    deterministic: bool = False


class Answer(BaseModel):
    action: int
    log_prob: float
    version: int


@app.post("/echo", response_model=Answer)
async def echo(question: Question) -> Answer:
    """The same answer to every question."""
    return Answer(action=1, log_prob=-0.5, version=1)
