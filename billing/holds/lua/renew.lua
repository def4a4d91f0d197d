-- A sign of life: renew a hold's lease, note what is known of its answer, put back what a flush took.
-- KEYS: 1 mirror  2 fill token  3 leases  4 call notes  then for each limiter: its calls in flight
-- ARGV: 1 call  2 lease member  3 amount  4 -amount  5 lease ms  6 notes ttl ms  7 wallet  8 USD  9 -USD  10 key  11 user
--       12 arrived, unix ms  13 limiters  then for each: calls in flight max (0: none)  then note, value, …
-- Returns 'renewed', 'restored', or 'cold' (no mirror: the fill under way is stopped, as it may not know of this hold).
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('ZADD', KEYS[3], now_ms + ARGV[5], ARGV[2])
for i = 1, tonumber(ARGV[13]) do
    if tonumber(ARGV[13 + i]) > 0 then redis.call('ZADD', KEYS[4 + i], now_ms + ARGV[5], ARGV[1]) end
end
local notes = 14 + ARGV[13]
if #ARGV >= notes then
    for i = notes, #ARGV, 2 do redis.call('HSET', KEYS[4], ARGV[i], ARGV[i + 1]) end
    redis.call('PEXPIRE', KEYS[4], ARGV[6])
end
local available = 'available:' .. ARGV[7]
local state = redis.call('HMGET', KEYS[1], available, 'hold:' .. ARGV[1], 'capped')
if not state[1] then
    redis.call('DEL', KEYS[1], KEYS[2])
    return 'cold'
end
if state[2] then return 'renewed' end
redis.call('HINCRBY', KEYS[1], available, ARGV[4]) -- may go below zero: the money was admitted before the flush
redis.call('HSET', KEYS[1], 'hold:' .. ARGV[1], ARGV[3])
if state[3] then
    redis.call('HSET', KEYS[1], 'usd:' .. ARGV[1], ARGV[8])
    for _, cap in ipairs(find_caps(KEYS[1], ARGV[7], ARGV[10], ARGV[11], tonumber(ARGV[12]))) do
        if cap.period ~= 'call' then redis.call('HINCRBY', KEYS[1], cap.field, cap.usd and ARGV[9] or ARGV[4]) end
    end
end
return 'restored'
