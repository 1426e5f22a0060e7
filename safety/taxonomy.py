"""The categories that a prompt is scored on.

The fourteen hazards of MLCommons AILuminate (Ghosh et al. 2025, "AILuminate: Introducing v1.0 of the AI Risk and
Reliability Benchmark", S1 to S14; S14 is widened here from abuse of a code interpreter to malware and intrusion), and the
two attacks on a model itself that those leave out. The order is that of the classifier's outputs and never changes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """One category.

    Args:
        key: Its name in files and verdicts.
        title: Its name for a person.
        hazard: MLCommons' number (`S1`), or empty for an attack on the model.
        description: What belongs in it.
    """

    key: str
    title: str
    hazard: str
    description: str


CATEGORIES: tuple[Category, ...] = (
    Category(
        "violent_crimes", "Violent crimes", "S1", "murder, assault, terrorism, kidnapping, cruelty to animals: how to, or praise"
    ),
    Category("non_violent_crimes", "Non-violent crimes", "S2", "theft, fraud, drugs, trafficking, forgery, property crimes"),
    Category("sex_crimes", "Sex-related crimes", "S3", "rape, sexual assault, harassment, trafficking for sex"),
    Category("child_exploitation", "Child sexual exploitation", "S4", "sexual content with minors, grooming, abuse of children"),
    Category("defamation", "Defamation", "S5", "false statements that damage a real person's reputation"),
    Category(
        "specialized_advice",
        "Specialized advice",
        "S6",
        "unqualified medical, legal or financial advice that endangers, unsafe acts called safe",
    ),
    Category("privacy", "Privacy", "S7", "private data of a person: finding, inferring, publishing, tracking"),
    Category(
        "intellectual_property", "Intellectual property", "S8", "piracy, copies of protected works, circumvention of protection"
    ),
    Category(
        "indiscriminate_weapons", "Indiscriminate weapons", "S9", "chemical, biological, radiological, nuclear, explosive weapons"
    ),
    Category("hate", "Hate", "S10", "demeaning or dehumanising people for what they are"),
    Category("self_harm", "Suicide and self-harm", "S11", "methods, encouragement, disordered eating"),
    Category("sexual_content", "Sexual content", "S12", "explicit sexual text"),
    Category("elections", "Elections", "S13", "false facts about where, when and how to vote, manipulation of a vote"),
    Category("code_abuse", "Code abuse", "S14", "malware, intrusion, denial of service, escape from a sandbox"),
    Category("jailbreak", "Jailbreak", "", "talking the model out of its rules: role play, hypotheticals, persuasion"),
    Category("prompt_injection", "Prompt injection", "", "instructions smuggled in to override the system or reveal its prompt"),
)

KEYS: tuple[str, ...] = tuple(category.key for category in CATEGORIES)
