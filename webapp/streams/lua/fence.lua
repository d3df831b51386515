-- FENCE: nothing is appended any more. The first reason stays; everyone is told it, and the final length.
-- KEYS 1 state. ARGV 1 reason, 2 epoch ('': any), 3 the end that the caller expects ('': any).
-- Completion names both, so that a worker which lost the session, or whose text is not all in the log, completes nothing.
local state = redis.call('HMGET', KEYS[1], 'epoch', 'fence', 'end', 'tlen', 'fenced_us')
if not state[1] or (ARGV[2] ~= '' and tonumber(state[1]) < tonumber(ARGV[2])) then
  return {'ABSENT'} -- also where Redis was emptied and an older epoch was opened since: this one's is gone
end
if ARGV[2] ~= '' and state[1] ~= ARGV[2] then
  return {'STALE', state[1]}
end
if state[2] then
  return {'FENCED', state[3], state[4], state[2], state[5]}
end
if ARGV[3] ~= '' and state[3] ~= ARGV[3] then
  return {'BEHIND', state[3], state[4]}
end
local now = redis.call('TIME')
local now_us = string.format('%.0f', now[1] * 1000000 + now[2])
redis.call('HSET', KEYS[1], 'fence', ARGV[1], 'fenced_us', now_us)
return {'OK', state[3], state[4], ARGV[1], now_us}
