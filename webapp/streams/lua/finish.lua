-- FINISH: put `done` at the end of the log, once, after the commit, and let both keys expire.
-- KEYS 1 state, 2 log. ARGV 1 committed length, 2 SEQ of done, 3 the event's data, 4 reason, 5 TTL in seconds; to make a
-- log that Redis has lost, 6 the epoch, then of each piece its end, kind and text, from position 0 on.
local state = redis.call('HMGET', KEYS[1], 'epoch', 'end', 'done', 'fence')
if not state[1] then
  if not ARGV[6] then
    return {'ABSENT'}
  end
  redis.call('DEL', KEYS[2])
  local thinking = 0
  for n = 7, #ARGV, 3 do
    redis.call('XADD', KEYS[2], ARGV[n] .. '-0', ARGV[n + 1], ARGV[n + 2])
    if ARGV[n + 1] == 't' then
      thinking = ARGV[n]
    end
  end
  redis.call('HSET', KEYS[1], 'epoch', ARGV[6], 'owner', '', 'end', ARGV[1], 'tlen', thinking, 'seq', 0)
elseif tonumber(state[2]) > tonumber(ARGV[1]) then
  return {'BEHIND', state[2]}
end
if not state[3] then
  redis.call('XADD', KEYS[2], ARGV[1] .. '-' .. ARGV[2], 'd', ARGV[3])
  redis.call('HSET', KEYS[1], 'done', 1)
end
if not state[4] then
  redis.call('HSET', KEYS[1], 'fence', ARGV[4], 'fenced_us', 0)
end
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('EXPIRE', KEYS[2], ARGV[5])
return {'OK', ARGV[1]}
