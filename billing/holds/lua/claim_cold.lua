-- Take the right to fill a mirror, if it is cold; one that is of no use is dropped, as reserve.lua does it. In one step: a right
-- that is taken while a mirror is warm would outlive a release, and a snapshot from before it could become the next mirror.
-- KEYS: 1 mirror  2 fill token   ARGV: 1 token  2 wallet  3 key  4 user  5 arrived, unix ms
-- Returns 1 if the caller shall fill it, 0 if it is warm, or somebody else fills it.
local life = lineage()
local state = redis.call('HMGET', KEYS[1], 'available:' .. ARGV[2], 'capped', 'lineage')
local _, over = {}, false
if state[1] and state[2] then _, over = find_caps(KEYS[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])) end
if state[1] and not over and state[3] == life then return 0 end
redis.call('DEL', KEYS[1])
return claim(KEYS[2], ARGV[1], life)
