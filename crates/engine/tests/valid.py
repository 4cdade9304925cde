"""Reads lines with a schema and a text, and fails for the first text that is not JSON or not valid against its schema."""

import json
import sys

import jsonschema

for line in sys.stdin:
    case = json.loads(line)
    cls = jsonschema.validators.validator_for(case["schema"], default=jsonschema.Draft202012Validator)
    cls.check_schema(case["schema"])
    validator = cls(case["schema"], format_checker=cls.FORMAT_CHECKER)
    try:
        validator.validate(json.loads(case["text"]))
    except (ValueError, jsonschema.ValidationError) as error:
        sys.exit(f"{json.dumps(case['schema'])}: {case['text']}: {error}")
