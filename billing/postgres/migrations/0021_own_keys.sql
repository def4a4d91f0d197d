-- What a provider behind OpenRouter bills to a key of our own there (BYOK) is part of what a call cost, and not of what OpenRouter's
-- credits were used for: the shadow ledger keeps it in rows of its own kind.
ALTER TABLE shadow_usd_ledger DROP CONSTRAINT shadow_usd_ledger_kind_check;
ALTER TABLE shadow_usd_ledger ADD CONSTRAINT shadow_usd_ledger_kind_check
    CHECK (kind IN ('opening', 'settlement', 'correction', 'own_key')) NOT VALID; -- every row there is passes
