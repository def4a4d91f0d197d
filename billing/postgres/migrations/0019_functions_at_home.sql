-- From here on functions stand in the rooms that call them, `billing/*/*.sql`, and this table says which are in the schema.

-- An edition is all functions as `tuma migrate` applied them; the last one stands. A program that finds its own among them
-- finds its functions, or newer ones under the same signatures. Who returns to an earlier text does so with a new number.
CREATE TABLE schema_functions (
    edition    integer PRIMARY KEY CHECK (edition > 0), -- 1, 2, 3, …
    number     integer NOT NULL,                        -- of the newest migration then
    digest     text NOT NULL,                           -- of all files
    files      jsonb NOT NULL,                          -- each file's SHA-256
    applied_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (number, digest)
);

-- Signatures of long ago, which no program that can run on version 18 calls.
DROP FUNCTION IF EXISTS settle_batch(
    uuid, uuid[], text[], text[], text[], text[], text[], bigint[], bigint[], bigint[], bigint[], bigint[], bigint[], bigint[],
    bigint[], bigint[], bigint[], integer[], integer[]);
DROP FUNCTION IF EXISTS judge_openings(uuid[], uuid[], bigint[]);
DROP FUNCTION IF EXISTS judge_extensions(uuid[], bigint[], bigint[]);
