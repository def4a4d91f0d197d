-- The prices of now.

-- What calls are priced with: the models that have a price now.
CREATE OR REPLACE FUNCTION list_prices()
RETURNS TABLE (id text, name text, created_at timestamptz, context_tokens bigint, completion_tokens_max bigint, price_id uuid,
               prompt_usd numeric, completion_usd numeric, cached_read_usd numeric, cached_write_usd numeric,
               reasoning_usd numeric, image_usd numeric, audio_usd numeric, request_usd numeric)
LANGUAGE sql STABLE AS $$
    SELECT m.id, m.name, m.created_at, m.context_tokens, m.completion_tokens_max, p.id, p.prompt_usd, p.completion_usd,
           p.cached_read_usd, p.cached_write_usd, p.reasoning_usd, p.image_usd, p.audio_usd, p.request_usd
    FROM models m JOIN model_prices p ON p.model_id = m.id AND p.valid_to IS NULL ORDER BY m.id
$$;

-- Prices of now for what is billed beside tokens; of models that have some.
CREATE OR REPLACE FUNCTION list_price_extras()
RETURNS TABLE (price_id uuid, extras jsonb)
LANGUAGE sql STABLE AS $$
    SELECT p.id, p.extras FROM model_prices p WHERE p.valid_to IS NULL AND p.extras <> '{}'
$$;
