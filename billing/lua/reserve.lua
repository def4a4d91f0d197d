-- Admit one call: every check, then the hold. One slot; amounts are decimal strings of nano units.
-- KEYS: 1 mirror  2 fill token  3 leases  4 key window  5 key calls in flight
-- ARGV: 1 call  2 lease member  3 amount  4 -amount  5 lease ms  6 requests/min  7 tokens/min  8 calls in flight max (0: none)
--       9 tokens of this call
-- Returns {verdict, n, remaining requests, reset ms, remaining tokens, reset ms}; n is the ms to wait when limited, and
-- for 'cold' 1 if the caller shall fill the mirror.
local now = redis.call('TIME')
local now_us = now[1] * 1000000 + now[2]
local now_ms = math.floor(now_us / 1000)

local state = redis.call('HMGET', KEYS[1], 'available', 'frozen', 'hold:' .. ARGV[1])
if not state[1] then
    local mine = redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', 5000)
    return {'cold', mine and 1 or 0, 0, 0, 0, 0}
end

-- GCRA (ITU-T I.371): a window is the theoretical arrival time, in microseconds; a minute may be used in one burst.
local window = redis.call('HMGET', KEYS[4], 'requests', 'tokens')
local function admit(tat, per_min, cost)
    local step = 60000000 / per_min
    local used = math.max(tonumber(tat or 0) - now_us, 0)
    local after = used + step * cost
    return after <= 60000000, after, math.floor((60000000 - used) / step + 0.000001), step, used
end
local r_ok, r_after, r_left, r_step, r_used = admit(window[1], tonumber(ARGV[6]), 1)
local t_ok, t_after, t_left, t_step, t_used = admit(window[2], tonumber(ARGV[7]), tonumber(ARGV[9]))
local function reply(verdict, n)
    return {verdict, n, r_left, math.ceil(r_used / 1000), t_left, math.ceil(t_used / 1000)}
end

if state[3] then return reply('granted', 0) end -- a repeat of this very call
if state[2] == '1' then return reply('wallet_frozen', 0) end
if not r_ok then return reply('requests', math.ceil((r_after - 60000000) / 1000)) end
if not t_ok then return reply('tokens', math.ceil((t_after - 60000000) / 1000)) end
local most = tonumber(ARGV[8])
if most > 0 then
    redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', now_ms)
    if redis.call('ZCARD', KEYS[5]) >= most then return reply('calls_in_flight', 1000) end
end
-- Lua's numbers lose integers above 2^53, so Redis does the arithmetic; the sign survives the conversion.
if redis.call('HINCRBY', KEYS[1], 'available', ARGV[4]) < 0 then
    redis.call('HINCRBY', KEYS[1], 'available', ARGV[3])
    return reply('insufficient_funds', 0)
end

-- Nothing below can refuse.
redis.call('HSET', KEYS[1], 'hold:' .. ARGV[1], ARGV[3])
redis.call('ZADD', KEYS[3], now_ms + ARGV[5], ARGV[2])
redis.call('HSET', KEYS[4], 'requests', string.format('%.0f', now_us + r_after), 'tokens', string.format('%.0f', now_us + t_after))
redis.call('PEXPIRE', KEYS[4], 61000)
if most > 0 then
    redis.call('ZADD', KEYS[5], now_ms + ARGV[5], ARGV[1])
    redis.call('PEXPIRE', KEYS[5], 86400000)
end
r_left, r_used = math.max(r_left - 1, 0), r_after
t_left, t_used = math.max(math.floor((60000000 - t_after) / t_step + 0.000001), 0), t_after
return reply('granted', 0)
