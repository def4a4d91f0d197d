-- Make a user's mirror from a snapshot of Postgres, only if absent and only if nothing touched it since the snapshot
-- was asked for: whoever releases, credits or renews on a cold mirror deletes the token, and so does a
-- change of the lineage.
-- KEYS: 1 mirror  2 fill token
-- ARGV: 1 token  2 ttl ms  3… field, value, …
-- Returns 1 if the mirror was made.
local life = lineage()
if redis.call('GET', KEYS[2]) ~= life .. ':' .. ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
for i = 3, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], 'lineage', life)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
